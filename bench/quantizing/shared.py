"""Codebooks that all layers of one format share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from bench.quantizing.job import Job
from vqkernels.calibration import Calibration
from vqkernels.errors import UnsupportedError
from vqkernels.formats import TensorFiles
from vqkernels.parts import check_fit
from vqkernels.quantize.shared import train
from vqkernels.spec import CodebookSpec

__all__ = ["SharedCodebooks"]


class SharedCodebooks:
    """The codebooks of each format of `job`, trained when the first layer asks for them."""

    def __init__(self, source: TensorFiles, job: Job, calibration: Calibration | None) -> None:
        self._source, self._job, self._calibration = source, job, calibration
        self._trained: dict[CodebookSpec, list[Tensor]] = {}

    def of(self, spec: CodebookSpec) -> list[Tensor]:
        """What `quantize(codebooks=...)` takes. Errors as for `train`."""
        if spec not in self._trained:
            names = [name for name, own in self._job.formats.items() if own == spec]
            fitting = [name for name in names if _fits(spec, self._source.shape(name))]
            known = self._calibration
            self._trained[spec] = train(
                self._source.tensors(fitting),
                spec,
                recipe=self._job.recipe,
                seed=self._job.seed,
                importance=None if known is None else _Diagonals(known, fitting),
            )
        return self._trained[spec]


class _Diagonals(Mapping[str, Tensor]):
    """The diagonal of each tensor's Hessian that is known, `[k]`, read when it is looked up."""

    def __init__(self, calibration: Calibration, names: list[str]) -> None:
        self._calibration, self._names = calibration, names

    def __getitem__(self, name: str) -> Tensor:
        moments = self._calibration.of_weight(name)
        if moments is None:
            raise KeyError(name)
        return moments.diagonal

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name.removesuffix(".weight") in self._calibration)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _fits(spec: CodebookSpec, shape: tuple[int, ...]) -> bool:
    with contextlib.suppress(UnsupportedError):
        check_fit(spec, *shape)
        return True
    return False
