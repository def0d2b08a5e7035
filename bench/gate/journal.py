"""The records of a gate: what each process measured, in one file that can be gone on with.

A process's records are written when it has ended, and a pair counts once both of its processes
are there: what was cut off is measured again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.measurement import Measurement
from bench.gate.inputs import Facts
from bench.gate.job import Target
from bench.gate.process import Process
from bench.gate.sides import SIDES, Side, Who
from bench.records import Case, RecordFile, measurement_of, read_records
from vqkernels.errors import ContainerError
from vqkernels.presets import parse_format

__all__ = ["Journal", "Round", "Sample", "case_name", "read_options"]


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of pairs: of which call (a gate is one, a selfcheck many), and its number in it."""

    call: str
    number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One case in one process. identity: of code, compilers, config and inputs; "" where it failed
    before that was known.
    """

    case: str
    side: Who
    pair: int
    measurement: Measurement
    state: Mapping[str, Any]
    identity: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]


class Journal:
    """The file at `path`, new or reopened.

    facts: of each weight, by its file's name. sides: that a pair has.
    """

    def __init__(
        self, file: RecordFile, facts: Mapping[str, Facts], seed: int, sides: int = len(SIDES)
    ) -> None:
        self._file, self._facts, self._seed, self._sides = file, facts, seed, sides
        self._samples: dict[Round, dict[tuple[int, int], dict[Who, list[Sample]]]] = {}
        self._whole: collections.Counter[tuple[Round, int, int]] = collections.Counter()
        for record in file.records:
            self._note(record)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._file.path

    def samples(self, round: Round) -> dict[int, list[Sample]]:
        """The samples of each pair of a round that is whole, by its number."""
        found = {}
        for (pair, attempt), sides in sorted(self._samples.get(round, {}).items()):
            if self._whole[round, pair, attempt] == self._sides:
                found[pair] = [one for side in sides.values() for one in side]
        return found

    def attempts(self, round: Round, pair: int) -> int:
        """How often a pair was begun."""
        return sum(number == pair for number, _ in self._samples.get(round, {}))

    def write(
        self,
        process: Process,
        cases: Mapping[str, Target],
        where: tuple[Round, int, int],
        who: Who,
        side: Side,
        inputs: Mapping[str, str],
    ) -> None:
        """Add what a process measured. where: round, pair and attempt. inputs: hashes by case."""
        round, pair, attempt = where
        for one in process.measured:
            gate = {
                **dataclasses.asdict(round),
                "pair": pair,
                "attempt": attempt,
                "side": who,
                "what": side.what,
                "revision": side.revision,
                "slow": side.slow,
                "of": len(process.measured),
                "code": one.facts.get("code"),
                "inputs": inputs[one.case],
            }
            head = {"device": process.device, "versions": process.versions, "gate": gate}
            case = self._case(cases[one.case], one.facts, bool(side.configs))
            self._note(self._file.write(case, one.measurement, one.state, head))

    def _case(self, target: Target, facts: Mapping[str, Any], chosen: bool) -> Case:
        codes, error, bits = self._facts[target.weight]
        return Case(
            workload=target.workload,
            layer=target.layer,
            format=target.format,
            spec=facts.get("spec") or parse_format(target.format).to_dict(),
            n=target.n,
            k=target.k,
            m=target.m,
            dtype=target.dtype,
            kernel=target.kernel,
            kernel_source=facts.get("source"),
            config=facts.get("config", {}),
            config_from="option" if chosen else "default",
            seed=self._seed,
            codes=codes,
            relative_error=error,
            effective_bits=bits,
        )

    def _note(self, record: Mapping[str, Any]) -> None:
        gate = record["gate"]
        round, key = Round(gate["call"], gate["number"]), (gate["pair"], gate["attempt"])
        found = self._samples.setdefault(round, {}).setdefault(key, {})
        samples = found.setdefault(gate["side"], [])
        samples.append(_sample(record))
        self._whole[round, *key] += len(samples) == gate["of"]


def _sample(record: Mapping[str, Any]) -> Sample:
    """A record of a gate's process, as what is judged."""
    gate = record["gate"]
    return Sample(
        case=case_name(record),
        side=gate["side"],
        pair=gate["pair"],
        measurement=measurement_of(record),
        state=record["state"],
        identity=_identity(record),
        device=record["device"],
        versions=record["versions"],
    )


def case_name(record: Mapping[str, Any]) -> str:
    """The name of a record's case: `Target.name`."""
    words = [record[name] for name in ("workload", "layer", "format", "m", "dtype", "kernel")]
    return "{} {} {} m={} {} {}".format(*words)


def _identity(record: Mapping[str, Any]) -> str:
    """Everything that decides what machine code runs on what."""
    gate = record["gate"]
    if gate["code"] is None:
        return ""
    parts = [gate["code"], gate["inputs"], gate["slow"], dict(record["config"])]
    return repr([*parts, sorted(record["versions"].items())])


def read_options(path: Path) -> dict[str, Any]:
    """The options of the gate whose records a file holds. Raises ContainerError where it isn't."""
    records = read_records(path)
    if not records or "gate" not in records[0] or "options" not in records[0]:
        raise ContainerError(f"{path}: holds no gate's records; start it anew")
    options: dict[str, Any] = records[0]["options"]
    return options
