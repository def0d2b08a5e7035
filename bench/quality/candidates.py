"""What is judged: quantised models as they are stored, and formats that are quantised here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.quality.layers import Calibrated
from bench.quality.original import Original
from bench.sources import View, chosen, provenance_of
from vqkernels.container.manifest import located
from vqkernels.container.origin import Made
from vqkernels.errors import TensorError
from vqkernels.formats import open_source
from vqkernels.formats.plain import INDEX as PLAIN_INDEX
from vqkernels.parallel import MAPPING
from vqkernels.quantize import Recipe, quantize
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["Candidate", "Job", "digests", "quantised_here", "stored"]

# Files that quantised matrices lie in, and what says how; of plain ones their parts too.
_ENDINGS = (".safetensors", ".npz", ".json")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Quantised matrices by name, each read or made when it is looked up.

    label: in tables. origin: what they come from, for the report. made: how each was made, where
    that is known.
    """

    label: str
    tensors: Mapping[str, QuantizedTensor]
    origin: Mapping[str, Any]
    made: Mapping[str, Made]


def stored(path: Path, label: str, patterns: Sequence[str]) -> Candidate:
    """The matrices at `path` (whatever `open_source` takes) that match a pattern; all without.

    Raises ContainerError where there is none, or none that a pattern matches.
    """
    source = open_source(path)
    with located(path):
        view = View(source, chosen(source, patterns))
    origin = {
        "stored": path.resolve().name,
        "sha256": digests(path),
        "provenance": provenance_of(source),
    }
    return Candidate(label, view, origin, view.made)


@dataclasses.dataclass(frozen=True)
class Job:
    """How a format is quantised here; weighted: by what the calibration knows of a layer."""

    spec: CodebookSpec
    recipe: Recipe
    seed: int
    weighted: bool


def quantised_here(
    label: str,
    job: Job,
    original: Original,
    names: Collection[str],
    moments_of: Callable[[str], Calibrated | None],
) -> Candidate:
    """The tensors `names` of the dense model in the format of `job`.

    moments_of: what a calibration knows of a tensor's layer.
    """
    tensors = _Quantised(job, original, names, moments_of)
    origin = {
        "format": job.spec.to_dict(),
        "recipe": job.recipe.to_dict(),
        "seed": job.seed,
        "weighted": job.weighted,
    }
    return Candidate(label, tensors, origin, {})


class _Quantised(Mapping[str, QuantizedTensor]):
    """Tensors of a dense model, quantised when they are looked up."""

    def __init__(
        self,
        job: Job,
        original: Original,
        names: Collection[str],
        moments_of: Callable[[str], Calibrated | None],
    ) -> None:
        self._job, self._original, self._names = job, original, dict.fromkeys(names)
        self._moments_of = moments_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> QuantizedTensor:
        if name not in self._names:
            raise KeyError(name)
        job, weight = self._job, self._original[name]
        hessian = self._hessian(name) if job.weighted else None
        try:
            return quantize(weight, job.spec, seed=job.seed, hessian=hessian, recipe=job.recipe)
        except TensorError as error:
            raise TensorError(f"tensor {name!r}: {error}") from error

    def _hessian(self, name: str) -> Tensor | None:
        moments = self._moments_of(name)
        if moments is None:
            return None
        return moments.diagonal if moments.gram is None else moments.gram


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of the file at `path`, or of each file of matrices in a folder, by its name there."""
    if path.name in (PLAIN_INDEX, MAPPING):
        path = path.parent
    if path.is_file():
        return {path.name: _digest(path)}
    endings = (*_ENDINGS, ".bin") if (path / PLAIN_INDEX).exists() else _ENDINGS
    files = sorted(file for file in path.rglob("*") if file.suffix in endings and file.is_file())
    return {str(file.relative_to(path)): _digest(file) for file in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
