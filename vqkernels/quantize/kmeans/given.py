"""What a clustering is given, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.quantize.kmeans.block import BLOCK

__all__ = ["Given"]


@dataclasses.dataclass(frozen=True)
class Given:
    """Points `[sets, count, length]` float32 on the CPU, finite.

    weights: None, `[sets, count]` or `[sets, count, length]` float32, none below 0.
    """

    points: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, points: Tensor, weights: Tensor | None) -> Given:
        """Points `[..., count, length]` and their weights; TensorError where they can't be used."""
        if points.ndim not in (2, 3) or 0 in points.shape:
            raise TensorError(
                f"k-means: points {list(points.shape)}; give [count, length] or "
                f"[sets, count, length]"
            )
        batch = points.detach().cpu().float().reshape(-1, *points.shape[-2:])
        if not bool(torch.isfinite(batch).all()):
            raise TensorError("k-means: points hold NaN or infinity; remove them")
        if weights is None:
            return cls(batch, None)
        if weights.shape not in (points.shape, points.shape[:-1]):
            raise TensorError(
                f"k-means: weights {list(weights.shape)} for points {list(points.shape)}; give one "
                f"a point or one a coordinate"
            )
        mass = weights.detach().cpu().float()
        if not bool((torch.isfinite(mass) & (mass >= 0)).all()):
            raise TensorError("k-means: weights must be finite and not below 0")
        shape = batch.shape if weights.ndim == points.ndim else batch.shape[:2]
        return cls(batch, mass.reshape(shape))

    def parts(self) -> Iterator[tuple[slice, Given]]:
        """A few sets at a time, and which they are."""
        step = max(1, BLOCK // self.points.shape[1])
        for first in range(0, len(self.points), step):
            part = slice(first, first + step)
            weights = None if self.weights is None else self.weights[part]
            yield part, Given(self.points[part], weights)

    def check_directions(self) -> None:
        """UnsupportedError for weights that a cosine has no place for."""
        if self.weights is not None and self.weights.ndim == 3:
            raise UnsupportedError(
                "k-means: distance 'cosine' takes one weight a vector, not one a coordinate; use "
                "'l2', or vectors whose elements share a weight (vector_axis 'out' for a Hessian)"
            )
