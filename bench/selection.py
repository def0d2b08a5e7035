"""What to run: workloads, layers, formats, kernels and m, narrowed by patterns."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

from bench.workload import Layer, Workload, load_workload
from vqkernels.errors import SpecError
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import PRESETS, parse_format

__all__ = ["DEFAULT", "Selection", "byte_code_formats", "matching_kernels"]


def byte_code_formats() -> tuple[str, ...]:
    """The presets whose codes are bytes: at most 256 entries a stage, 256 in the first."""
    return tuple(name for name, spec in PRESETS.items() if spec.stages[0] == 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Layers of one workload in some formats, at some m. Layers and kernels by glob."""

    workload: str
    layers: tuple[str, ...] = ("*",)
    formats: tuple[str, ...]
    ms: tuple[int, ...] = (1,)

    def cases(self) -> Iterator[tuple[Workload, Layer, str]]:
        """Workload, layer and format of every selected case.

        Raises SpecError where a pattern matches no layer or a format is unknown.
        """
        for name in self.formats:
            parse_format(name)  # before anything is measured
        workload = load_workload(self.workload)
        chosen = [
            layer
            for layer in workload.layers
            if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in self.layers)
        ]
        if not chosen:
            names = ", ".join(layer.name for layer in workload.layers)
            raise SpecError(
                f"workload {self.workload}: no layer matches {' '.join(self.layers)}; "
                f"there are: {names}"
            )
        for layer in chosen:
            for name in self.formats:
                yield workload, layer, name


# What `vqbench run` does unasked: all real weights in one format, and one square and one long
# layer of a 7B model in every format of up to 256 entries.
DEFAULT = (
    Selection(workload="minilm", formats=("rq-2x256x8",)),
    Selection(workload="llama2-7b", layers=("q_proj", "down_proj"), formats=byte_code_formats()),
)


def matching_kernels(patterns: Sequence[str]) -> list[Kernel]:
    """Kernels whose id matches a glob; the dense baseline first, since others are set against it.

    Raises SpecError where none does.
    """
    found = registry()
    chosen = [
        kernel
        for name, kernel in found.kernels.items()
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise SpecError(
            f"no kernel matches {' '.join(patterns)}; there are: {', '.join(found.kernels)}"
        )
    return sorted(chosen, key=lambda kernel: kernel.reads != "dense")
