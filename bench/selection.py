"""What to run: workloads, layers, formats, kernels and m, narrowed by patterns."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from bench.peers import peers
from bench.workload import STORED, Layer, Workload, load_workload
from vqkernels.device import Device
from vqkernels.errors import SpecError
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import PRESETS, parse_format

__all__ = ["DEFAULT", "Selection", "byte_code_formats", "matching_kernels", "selections"]


# Names of layers that an error lists: more than one block of any model has.
_MOST_NAMES = 40


def byte_code_formats() -> tuple[str, ...]:
    """The presets whose codes are bytes: at most 256 entries a stage, 256 in the first."""
    return tuple(name for name, spec in PRESETS.items() if spec.stages[0] == 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Layers of one workload in some formats, at some m. Layers and kernels by glob.

    workload: its name, or the path of its file. model: the workload itself, where it is a stored
    model. fuse: layers of one input as one, where the workload names them.
    """

    workload: str
    model: Workload | None = None
    layers: tuple[str, ...] = ("*",)
    formats: tuple[str, ...]
    ms: tuple[int, ...] = (1,)
    fuse: bool = False

    def cases(self) -> Iterator[tuple[Workload, Layer, str]]:
        """Workload, layer and format of every selected case.

        Raises SpecError where a pattern matches no layer or a format is unknown.
        """
        for name in self.formats:
            if name != STORED:
                parse_format(name)  # before anything is measured
        workload = self.model or load_workload(self.workload)
        if self.fuse:
            workload = workload.fused()
        names = [layer.name for layer in workload.layers]
        if unused := _unmatched(self.layers, names):
            raise SpecError(
                f"workload {self.workload}: no layer matches {unused}; there are: {_listed(names)}"
            )
        wanted = set(_matching(self.layers, names))
        chosen = [layer for layer in workload.layers if layer.name in wanted]
        for layer in chosen:
            for name in self.formats:
                yield workload, layer, name


# What `vqbench run` does unasked: all real weights in one format, and one square and one long
# layer of a 7B model in every format of up to 256 entries.
DEFAULT = (
    Selection(workload="minilm", formats=("rq-2x256x8",)),
    Selection(workload="llama2-7b", layers=("q_proj", "down_proj"), formats=byte_code_formats()),
)


def selections(
    workloads: Sequence[str],
    layers: Sequence[str],
    formats: Sequence[str],
    ms: Sequence[int],
    fuse: bool = False,
) -> tuple[Selection, ...]:
    """What `vqbench run` runs: the default selection at some m, or what is named."""
    if not (workloads or formats or layers or fuse):
        return tuple(
            Selection(
                workload=one.workload,
                layers=one.layers,
                formats=one.formats,
                ms=tuple(ms) or one.ms,
            )
            for one in DEFAULT
        )
    return tuple(
        Selection(
            workload=name,
            layers=tuple(layers) or ("*",),
            formats=tuple(formats) or ("rq-2x256x8",),
            ms=tuple(ms) or (1,),
            fuse=fuse,
        )
        for name in workloads or ("minilm",)
    )


def matching_kernels(patterns: Sequence[str], device: Device | None = None) -> list[Kernel]:
    """Kernels whose id matches a glob; without globs all, or those for the device's kind.

    Others' kernels (`bench.peers`) run where a glob names them. The dense baseline comes first,
    since the others are set against it.

    Raises SpecError where a pattern matches none.
    """
    own = registry().kernels
    found = {**own, **peers()}
    if unused := _unmatched(patterns, found):
        raise SpecError(f"no kernel matches {unused}; there are: {', '.join(found)}")
    chosen = [found[name] for name in _matching(patterns, found)] if patterns else [*own.values()]
    if not patterns and device is not None:
        chosen = [kernel for kernel in chosen if device.kind in kernel.runs_on]
    return sorted(chosen, key=lambda kernel: kernel.reads != "dense")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]


def _unmatched(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first pattern that matches none: a typo beside a pattern that does."""
    return next((pattern for pattern in patterns if not _matching([pattern], names)), None)
