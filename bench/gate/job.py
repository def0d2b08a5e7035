"""What a gate measures: its cases, and everything that a process which measures them needs to know.

A job is a JSON file, since the process that reads it may be another version's Python.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.bandwidth import Bandwidth
from autotune.timers import Budget
from bench.selection import Selection
from vqkernels.kernel import Kernel

__all__ = ["ABSENT", "BEGIN", "DONE", "TURN", "Job", "Target", "inputs_hash", "targets"]

# The reason of a case whose kernel a side doesn't have.
ABSENT = "there is no such kernel"

# What a process asks for: to begin a case, a turn of taking samples, to go on after the last turn.
BEGIN, TURN, DONE = b"b", b"t", b"d"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One case: a kernel on a layer in a format, for m tokens.

    source: the workload's name, or its file. fused: whether the layer is several as one. rows: of
    each of its parts, of itself where it is one; k: its input features.
    """

    source: str
    fused: bool
    workload: str
    layer: str
    format: str
    rows: tuple[int, ...]
    k: int
    m: int
    dtype: str
    kernel: str

    @property
    def n(self) -> int:
        """Output features."""
        return sum(self.rows)

    @property
    def name(self) -> str:
        """The case in one line: what noise floors and records know it by."""
        return f"{self.workload} {self.layer} {self.format} m={self.m} {self.dtype} {self.kernel}"

    @property
    def weight(self) -> str:
        """File name of its weight, which other kernels and m share."""
        return f"{_short(self.source, self.layer, self.format)}.vq.safetensors"

    @property
    def answers(self) -> str:
        """File name of what the oracle said of its weight and tokens, which other kernels share."""
        key = _short(self.source, self.layer, self.format, self.m, self.dtype)
        return f"{key}.answers.safetensors"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Target:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**{**fields, "rows": tuple(fields["rows"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: `targets` in order, on `device`, with inputs from `folder`.

    device: as torch names it. threads: of a CPU. configs: values of a kernel's parameters that
    replace those of its default, by kernel id. slow: by which share of its own time each call is
    delayed.
    """

    targets: tuple[Target, ...]
    folder: str
    device: str
    threads: int
    seed: int
    budget: Budget
    cold: bool
    bandwidth: Bandwidth
    configs: Mapping[str, Mapping[str, Any]]
    slow: float = 0.0

    def to_json(self) -> str:
        """The job as a file holds it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(
            **{
                **fields,
                "targets": tuple(Target.from_dict(one) for one in fields["targets"]),
                "budget": Budget(**fields["budget"]),
                "bandwidth": Bandwidth(**fields["bandwidth"]),
            }
        )


def targets(
    selections: Iterable[Selection], kernels: Sequence[Kernel], dtype: str
) -> tuple[Target, ...]:
    """The cases of some selections: those of one weight follow one another."""
    return tuple(
        Target(
            source=selection.workload,
            fused=selection.fuse,
            workload=workload.name,
            layer=layer.name,
            format=name,
            rows=layer.shape[:-1],
            k=layer.k,
            m=m,
            dtype=dtype,
            kernel=kernel.id,
        )
        for selection in selections
        for workload, layer, name in selection.cases()
        for m in selection.ms
        for kernel in kernels
    )


def _short(*words: object) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def inputs_hash(folder: Path, target: Target, seed: int) -> str:
    """SHA-256 of what a case's kernel is given: its weight, and what its tokens are drawn by.

    Not of what the oracle said: its last bits may depend on how many threads were free.
    """
    digest = hashlib.sha256((folder / target.weight).read_bytes())
    digest.update(json.dumps([seed, target.m, target.k, target.dtype]).encode())
    return digest.hexdigest()
