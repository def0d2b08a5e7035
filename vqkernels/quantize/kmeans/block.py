"""Points of a clustering, shifted and scaled so that float32 products of them are accurate.

All work on them goes tile by tile over as many threads as torch has, and each tile's result
depends on that tile alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.near import nearest_of_many

__all__ = ["BLOCK", "MANY_ENTRIES", "Block", "Codes", "Flags", "Floats"]

# Floats of one tile of scores: 1 MiB, the L2 of a server core, so argmin reads it from there.
TILE = 1 << 18
# Entries of one tile: 1 MiB is then 256 points or more, enough rows for a product to run well.
TILE_ENTRIES = 1024
# Points whose centroids are found together, where there are many small sets: a few MiB.
BLOCK = 1 << 16
# From how many on neighbours are looked through, and not all entries: distances between entries
# take as long as those of 50,000 points to all of them.
MANY_ENTRIES = 4096
MANY_POINTS = 1 << 16

Codes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
# Of sets, points and entries: `[sets, points, entries]`.
Scores = Callable[[slice, slice, slice], npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Block:
    """Sets of points, shifted and scaled so that float32 products of them are accurate.

    points: `[sets, count, length]`, at most about 1, their weighted mean at 0.
    weights: None, `[sets, count]` or `[sets, count, length]`, at most about 1.
    rows: `[sets, count, columns]`; `rows @ table(centroids) + base` are squared errors (times the
        weights, where there is one a coordinate).
    mean, exponent: `point * 2^exponent + mean * 2^exponent` is the point that was given.
    """

    points: Tensor
    weights: Tensor | None
    rows: Tensor
    base: Tensor
    mean: Tensor
    exponent: Tensor
    workers: Executor

    @classmethod
    def of(cls, points: Tensor, weights: Tensor | None, workers: Executor) -> Block:
        """Of points and weights as given: `[sets, count, length]` and as for `weights`."""
        exponent = _exponent(points)
        points = points * torch.exp2(-exponent.float())
        if weights is not None:
            weights = weights * torch.exp2(-_exponent(weights).float())
        each = None if weights is None else weights.reshape(*weights.shape[:2], -1)
        if each is None:
            mean = points.mean(1, keepdim=True, dtype=torch.float64)
        else:
            total = each.sum(1, keepdim=True, dtype=torch.float64).clamp(min=1e-300)
            mean = (points * each).sum(1, keepdim=True, dtype=torch.float64) / total
        # -2xc + |c|^2 cancels badly far from 0: x = 100, spread 0.01 leaves one digit
        points = points - mean.float()
        if weights is not None and weights.ndim == 3:
            rows = torch.cat([points * weights, weights], dim=-1)
            base = (points * rows[..., : points.shape[-1]]).sum(-1)
        else:
            rows = torch.cat([points, torch.ones(*points.shape[:2], 1)], dim=-1)
            base = points.square().sum(-1)
        return cls(points, weights, rows, base, mean.float(), exponent, workers)

    @property
    def by_coordinate(self) -> bool:
        """Whether weights differ inside a point."""
        return self.weights is not None and self.weights.ndim == 3

    def enter(self, centroids: Tensor) -> Tensor:
        """Centroids as given, in this block's shift and scale: `[sets, entries, length]`."""
        scaled = centroids.double() * torch.exp2(-self.exponent.double())
        return (scaled - self.mean).float()

    def restore(self, centroids: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return ((centroids.double() + self.mean) * torch.exp2(self.exponent.double())).float()

    def table(self, centroids: Tensor) -> Tensor:
        """What `rows` is multiplied by: `[sets, columns, entries]`, |x|^2 left out."""
        squares = centroids.square()
        if not self.by_coordinate:
            squares = squares.sum(-1, keepdim=True)
        return torch.cat([-2 * centroids, squares], dim=-1).transpose(1, 2).contiguous()

    def mass(self) -> Tensor:
        """Weight of each point: `[sets, count]`."""
        if self.weights is None:
            return torch.ones(self.points.shape[:2])
        return self.weights.sum(-1) if self.by_coordinate else self.weights

    def nearest(self, centroids: Tensor) -> Codes:
        """Code of the nearest centroid: `[sets, count]`."""
        entries, count = centroids.shape[1], self.points.shape[1]
        if entries >= MANY_ENTRIES and count >= MANY_POINTS and not self.by_coordinate:
            return self._nearest_of_many(centroids)
        table = self.table(centroids)

        def scores(sets: slice, points: slice, entries: slice) -> npt.NDArray[np.float32]:
            return torch.bmm(self.rows[sets, points], table[sets, :, entries]).numpy()

        return self.lowest(scores, entries)

    def _nearest_of_many(self, centroids: Tensor) -> Codes:
        # the nearest of every so many entries, as they come in no order; codes of the iteration
        # before are nearer, but few points share one: 45 s of CPU instead of 24 (2 million, 65,536)
        step = max(1, centroids.shape[1] // TILE_ENTRIES)
        guess = self.nearest(centroids[:, ::step]) * step
        found = [
            nearest_of_many(points.numpy(), entries.numpy(), codes, self.workers)
            for points, entries, codes in zip(self.points, centroids, guess, strict=True)
        ]
        return np.stack(found)

    def lowest(self, scores: Scores, entries: int) -> Codes:
        """Code of the lowest score of each point, the lowest code where equal: `[sets, count]`.

        A tile of entries at a time, and in numpy: its argmin is 8 times as fast as torch's.
        """
        codes = np.zeros(self.points.shape[:2], np.int64)

        def tile(sets: slice, points: slice) -> None:
            if entries <= TILE_ENTRIES:
                codes[sets, points] = scores(sets, points, slice(None)).argmin(axis=-1)
                return
            found = codes[sets, points]
            best = np.full(found.shape, np.inf, np.float32)
            for first in range(0, entries, TILE_ENTRIES):
                each = scores(sets, points, slice(first, first + TILE_ENTRIES))
                nearest = each.argmin(axis=-1)
                score = np.take_along_axis(each, nearest[..., None], axis=-1)[..., 0]
                better = score < best
                best[better], found[better] = score[better], nearest[better] + first

        self._over_tiles(tile, entries)
        return codes

    def distances(self, centroids: Tensor) -> Tensor:
        """Weighted squared error of each point to the nearest: `[sets, count]`."""
        table = self.table(centroids)
        errors = torch.empty(self.points.shape[:2])

        def tile(sets: slice, points: slice) -> None:
            scores = torch.bmm(self.rows[sets, points], table[sets])
            errors[sets, points] = scores[..., 0] if scores.shape[-1] == 1 else scores.amin(-1)

        self._over_tiles(tile, centroids.shape[1])
        errors.add_(self.base).clamp_(min=0)
        if self.weights is not None and not self.by_coordinate:
            errors.mul_(self.weights)
        return errors

    def _over_tiles(self, work: Callable[[slice, slice], None], entries: int) -> None:
        sets, count = self.points.shape[:2]
        width = min(entries, TILE_ENTRIES)
        height = min(count, max(1, TILE // width))
        together = max(1, TILE // (width * count))
        tiles = [
            (slice(first, first + together), slice(start, start + height))
            for first in range(0, sets, together)
            for start in range(0, count, height)
        ]
        if len(tiles) == 1:
            work(*tiles[0])
            return
        for _ in self.workers.map(lambda tile: work(*tile), tiles):
            pass

    def sums(self, codes: Codes, entries: int) -> tuple[Floats, Floats]:
        """Weighted sum and weight of each code's points: `[length, sets * entries]` both."""
        sets, _, length = self.points.shape
        flat = (codes + np.arange(sets)[:, None] * entries).ravel()

        def summed(values: Tensor | None) -> Floats:
            each = None if values is None else values.numpy().ravel()
            return np.bincount(flat, each, minlength=sets * entries).astype(np.float64)

        columns, weights = np.empty((length, sets * entries)), self.weights
        mass = np.empty_like(columns)
        for j in range(length):
            values = self.rows[..., j] if self.by_coordinate else self.points[..., j]
            if weights is not None and not self.by_coordinate:
                values = values.double() * weights
            columns[j] = summed(values)
            if self.by_coordinate or j == 0:
                mass[j:] = summed(self.rows[..., length + j] if self.by_coordinate else weights)
        return columns, mass

    def means(self, codes: Codes, old: Tensor) -> tuple[Tensor, Flags]:
        """Weighted mean of each code's points (`old` where it has none), and which have none."""
        sets, entries, length = old.shape
        columns, mass = self.sums(codes, entries)
        before = old.double().numpy().reshape(-1, length).T
        centroids = np.divide(columns, mass, out=before.copy(), where=mass > 0)
        empty = (mass.sum(0) == 0).reshape(sets, entries)
        return torch.from_numpy(centroids.T.reshape(old.shape)).float(), empty

    def take(self, index: Tensor) -> Block:
        """The points of every set that `index: [some]` numbers."""
        return dataclasses.replace(
            self,
            points=self.points[:, index],
            weights=None if self.weights is None else self.weights[:, index],
            rows=self.rows[:, index],
            base=self.base[:, index],
        )


def _exponent(values: Tensor) -> Tensor:
    """A power of two that brings each set to about 1, so that no square under- or overflows.

    Exact, and so without effect on the result. Broadcasts against `values: [sets, ...]`.
    """
    _, exponent = torch.frexp(values.abs().amax(tuple(range(1, values.ndim)), keepdim=True))
    return exponent.clamp(-120, 120)
