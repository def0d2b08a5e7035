"""Codebooks of all stages together, the best for fixed codes and a full Hessian.

The decoded matrix is linear in the entries, so the output error is a quadratic form in them:
conjugate gradients (Hestenes and Stiefel 1952) with the form's diagonal as preconditioner, from
the entries there are. Entries that no cell uses stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.quantize.grid import Grid
from vqkernels.quantize.products import product
from vqkernels.threads import one_thread

__all__ = ["solve"]


@one_thread()
def solve(
    grid: Grid,
    entries: Sequence[Tensor],
    codes: Tensor,
    *,
    steps: int = 50,
    tolerance: float = 1e-5,
) -> list[Tensor]:
    """Entries `[books, entries, size]` float64 of each stage, for `codes: [rows, columns, stages]`.

    tolerance: ends where a step lowers the error by less than this share of it.
    """
    sizes = [book.shape[1] for book in entries]
    mass = grid.mass.reshape(-1, 1)

    def pulled(error: Tensor) -> Tensor:
        return _joined(grid.gather(mass * product(error, grid.hessian), codes, sizes))

    found = _joined([book.double() for book in entries])
    error = grid.matrix - grid.decode(entries, codes)
    loss = grid.loss(error)
    diagonal = _joined(grid.gather(mass * grid.hessian.diagonal(), codes, sizes))
    scale = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-300), 0.0)
    slope = pulled(error)
    direction = scale * slope
    first = steep = _dot(slope, direction)
    for _ in range(steps):
        bend = pulled(grid.decode(_apart(direction, entries), codes))
        curvature = _dot(direction, bend)
        # solved to the last digit: what is left is rounding, and stages that share a constant
        # have directions without curvature that it would run away along
        if curvature <= 0 or steep <= 1e-24 * first:
            break
        length = steep / curvature
        found = found + length * direction
        loss -= length * steep
        if length * steep <= tolerance * loss:
            break
        slope = slope - length * bend
        before, steep = steep, _dot(slope, scale * slope)
        direction = scale * slope + steep / before * direction
    return _apart(found, entries)


def _joined(books: Sequence[Tensor]) -> Tensor:
    return torch.cat([book.reshape(-1) for book in books])


def _apart(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    ends = list(itertools.accumulate(book.numel() for book in like))
    return [
        values[end - book.numel() : end].reshape(book.shape)
        for end, book in zip(ends, like, strict=True)
    ]


def _dot(left: Tensor, right: Tensor) -> float:
    # numpy adds in one order, whatever the number of threads
    return float((left * right).numpy().sum())
