"""From what is asked to the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.conversion import progress
from bench.environment import describe_host
from bench.quality.candidates import Candidate, Job, digests, quantised_here, stored
from bench.quality.judge import judge
from bench.quality.original import Original, original_of
from bench.quality.report import Judged, Report
from bench.quality.whole import EndToEnd, folder_of, sections
from bench.quantizing.choice import Formats, choose
from bench.sources import View
from vqkernels.calibration import Calibration, load_calibration
from vqkernels.device import detect_cpu
from vqkernels.errors import ContainerError
from vqkernels.quantize import Recipe
from vqkernels.tensor import QuantizedTensor

__all__ = ["Asked", "make_report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What to judge, and on what.

    model: the dense one, by path or `minilm`. patterns: of its layers, by glob; all without.
    quantised: paths of stored candidates.
    formats: names of those to quantise here, by `recipe`, and if `weighted` by the calibration.
    """

    model: str
    patterns: tuple[str, ...]
    quantised: tuple[Path, ...]
    formats: tuple[str, ...]
    recipe: Recipe
    calibration: Path | None
    weighted: bool
    seed: int
    end_to_end: EndToEnd


def make_report(asked: Asked) -> Report:
    """Measure everything. Raises VqError, one line, for whatever can't be read or doesn't fit."""
    original = original_of(asked.model)
    calibration = Calibration({})
    if asked.calibration is not None:
        calibration = load_calibration(asked.calibration)
        _check_known(calibration, original, asked.calibration)
    candidates = [
        stored(path, label, asked.patterns) for path, label in _labels(asked.quantised).items()
    ]
    candidates += _here(asked, original, calibration)
    folder = folder_of(original) if asked.end_to_end else None
    with progress(sum(len(one.tensors) for one in candidates)) as begin:
        step = begin("measuring")
        found = []
        for one in candidates:
            # what is stored is read again when it is needed; what is made here is kept
            kept: dict[str, QuantizedTensor] = {}
            keep = None if folder is None or isinstance(one.tensors, View) else kept
            judged = judge(
                one, original, calibration.of_weight, seed=asked.seed, on_layer=step, keep=keep
            )
            if folder is not None:
                judged = _run_whole(asked.end_to_end, folder, one, judged, kept)
            found.append(judged)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("vqbench", *sys.argv[1:]),
        seed=asked.seed,
        environment=describe_host(detect_cpu()),
        model={
            "name": original.path.resolve().name,
            "sha256": {name: one for file in original.files for name, one in digests(file).items()},
        },
        calibration=_told(asked.calibration, calibration) if asked.calibration else None,
        candidates=tuple(found),
    )


def _run_whole(
    asked: EndToEnd,
    folder: Path,
    candidate: Candidate,
    judged: Judged,
    kept: Mapping[str, QuantizedTensor],
) -> Judged:
    """`judged` with its sections."""
    quantised = kept
    if isinstance(candidate.tensors, View):
        quantised = View(candidate.tensors, [layer.layer for layer in judged.layers])
    if not quantised:
        return judged  # no layer holds the format
    return dataclasses.replace(judged, sections=sections(asked, folder, quantised))


def _here(asked: Asked, original: Original, calibration: Calibration) -> list[Candidate]:
    """A candidate for each format, of the tensors that `vqbench quantize` would take."""
    found = []
    for name in dict.fromkeys(asked.formats):
        formats = Formats.parse(name, ())
        names = choose(original.tensors, formats, asked.patterns).formats
        label = Path(name).stem if name.endswith(".toml") else name
        job = Job(formats.usual, asked.recipe, asked.seed, asked.weighted)
        found.append(quantised_here(label, job, original, names, calibration.of_weight))
    return found


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each path, or all of it where several have that name."""
    names = [path.resolve().name for path in paths]
    return {
        path: str(path) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    }


def _check_known(calibration: Calibration, original: Original, path: Path) -> None:
    if not any(name.removesuffix(".weight") in calibration for name in original):
        raise ContainerError(
            f"{path}: none of its {len(calibration)} layers ({', '.join(list(calibration)[:2])}, "
            f"...) is in {original.path}; calibrate this model"
        )


def _told(path: Path, calibration: Calibration) -> dict[str, Any]:
    return {
        "name": path.resolve().name,
        "sha256": digests(path),
        "layers": len(calibration),
        "provenance": calibration.provenance,
    }
