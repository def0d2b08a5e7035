"""Weighted k-means, for one set of points or many at once, with the same bits on every run.

Lloyd's iterations (1957) from k-means++ (Arthur and Vassilvitskii 2007). An error is
`sum_j weight_j * (point_j - centroid_j)^2`; weights are one number a point, or one a coordinate
(a diagonal Hessian, or zeros over padding).

Reproducible: sums over points run in float64 and in the order of the points (numpy.bincount), and
matrix products run on one thread each, so the number of threads changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.errors import TensorError

__all__ = ["KMeans", "assign", "kmeans", "point_errors"]

# Floats of one tile of scores: 1 MiB, the L2 of a server core, so argmin reads it from there.
TILE = 1 << 18
# Entries of one tile: 1 MiB is then 256 points or more, enough rows for a product to run well.
TILE_ENTRIES = 1024
# Points whose centroids are found together, where there are many small sets: a few MiB.
BLOCK = 1 << 16
# k-means++ draws one entry a round, and each round reads every point. Past this number of entries a
# round draws several (as k-means||, Bahmani et al. 2012, but without a second clustering): 65,536
# rounds over 2 million points would take a quarter of an hour.
ROUNDS = 1024

Codes = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class KMeans:
    """Result: `centroids: [..., entries, length]` float32, `codes: [..., count]` int64.

    distortion: weighted sum of squared errors, over all sets.
    """

    centroids: Tensor
    codes: Tensor
    distortion: float


def kmeans(
    points: Tensor,
    entries: int,
    *,
    weights: Tensor | None = None,
    seed: int | tuple[int, ...] = 0,
    iterations: int = 25,
) -> KMeans:
    """Centroids of `points: [count, length]`, or of each set of `[sets, count, length]`.

    weights: `[..., count]` or `[..., count, length]`, none below 0.
    seed: what the first centroids are drawn with.

    A code that no point uses is put on the farthest point of the cluster with the largest error.
    Codes stay unused only where there are fewer distinct points than entries. Raises TensorError
    for shapes that don't fit, NaN, negative weights or no points.
    """
    batch, mass = _checked(points, weights)
    if entries < 1:
        raise TensorError(f"k-means: {entries} entries; ask for 1 at least")
    sets, count, length = batch.shape
    draws = np.random.default_rng(seed).random((sets, min(entries, ROUNDS)))
    centroids = torch.empty(sets, entries, length)
    codes = torch.empty(sets, count, dtype=torch.int64)
    distortion = 0.0
    step = max(1, BLOCK // count)
    with _workers() as workers:
        for first in range(0, sets, step):
            part = slice(first, first + step)
            block = _Block.of(batch[part], None if mass is None else mass[part], workers)
            found = _lloyd(block, _seeds(block, entries, draws[part]), iterations)
            centroids[part] = block.restore(found)
            # against the float32 centroids that the caller gets, not the float64 ones
            codes[part] = torch.from_numpy(block.nearest(block.enter(centroids[part])))
        for part in (slice(first, first + step) for first in range(0, sets, step)):
            errors = point_errors(
                batch[part], centroids[part], codes[part], None if mass is None else mass[part]
            )
            distortion += float(errors.sum(dtype=torch.float64))
    shape = points.shape[:-2]
    return KMeans(
        centroids.reshape(*shape, entries, length), codes.reshape(*shape, count), distortion
    )


def assign(points: Tensor, centroids: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The nearest centroid of each point: codes `[..., count]`, int64; the lowest where equal.

    Shapes and errors as for `kmeans`; `centroids: [..., entries, length]`. One weight a point
    changes nothing here.
    """
    batch, mass = _checked(points, weights)
    books = centroids.reshape(-1, *centroids.shape[-2:]).float()
    if len(books) != len(batch) or books.shape[-1] != batch.shape[-1]:
        raise TensorError(
            f"assign: centroids {list(centroids.shape)} don't fit points {list(points.shape)}; "
            f"give [entries, {points.shape[-1]}] for each set"
        )
    codes = torch.empty(batch.shape[:2], dtype=torch.int64)
    step = max(1, BLOCK // batch.shape[1])
    with _workers() as workers:
        for first in range(0, len(batch), step):
            part = slice(first, first + step)
            block = _Block.of(batch[part], None if mass is None else mass[part], workers)
            codes[part] = torch.from_numpy(block.nearest(block.enter(books[part])))
    return codes.reshape(points.shape[:-1])


def point_errors(
    points: Tensor, centroids: Tensor, codes: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted squared error of each point: `[sets, count]`, from the differences themselves."""
    which = torch.arange(len(points))[:, None]
    errors = (points - centroids[which, codes]).double().square()
    if weights is None:
        return errors.sum(-1)
    if weights.ndim == 3:
        return (errors * weights).sum(-1)
    return errors.sum(-1) * weights


def _checked(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if points.ndim not in (2, 3) or 0 in points.shape:
        raise TensorError(
            f"k-means: points {list(points.shape)}; give [count, length] or [sets, count, length]"
        )
    batch = points.detach().cpu().float().reshape(-1, *points.shape[-2:])
    if not bool(torch.isfinite(batch).all()):
        raise TensorError("k-means: points hold NaN or infinity; remove them")
    if weights is None:
        return batch, None
    if weights.shape not in (points.shape, points.shape[:-1]):
        raise TensorError(
            f"k-means: weights {list(weights.shape)} for points {list(points.shape)}; give one a "
            f"point or one a coordinate"
        )
    mass = weights.detach().cpu().float()
    if not bool((torch.isfinite(mass) & (mass >= 0)).all()):
        raise TensorError("k-means: weights must be finite and not below 0")
    return batch, mass.reshape(batch.shape if weights.ndim == points.ndim else batch.shape[:2])


@contextlib.contextmanager
def _workers() -> Iterator[Executor]:
    """As many Python threads as torch has, with torch itself held to one.

    A tile takes 0.1 ms, so OpenMP's barrier a product cost more than its second thread gained (35
    ms an iteration against 10 on a shared machine); and a product that is split otherwise may
    round otherwise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class _Block:
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
    def of(cls, points: Tensor, weights: Tensor | None, workers: Executor) -> _Block:
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
        table = self.table(centroids)
        codes = np.empty(self.points.shape[:2], np.int64)

        def tile(sets: slice, points: slice) -> None:
            codes[sets, points] = _argmin(self.rows[sets, points], table[sets])

        self._over_tiles(tile, centroids.shape[1])
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

    def means(self, codes: Codes, old: Tensor) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        """Weighted mean of each code's points (`old` where it has none), and which have none."""
        sets, entries, length = old.shape
        flat = (codes + np.arange(sets)[:, None] * entries).ravel()

        def summed(values: Tensor | None) -> npt.NDArray[np.float64]:
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
        before = old.double().numpy().reshape(-1, length).T
        centroids = np.divide(columns, mass, out=before.copy(), where=mass > 0)
        empty = (mass.sum(0) == 0).reshape(sets, entries)
        return torch.from_numpy(centroids.T.reshape(old.shape)).float(), empty


def _exponent(values: Tensor) -> Tensor:
    """A power of two that brings each set to about 1, so that no square under- or overflows.

    Exact, and so without effect on the result. Broadcasts against `values: [sets, ...]`.
    """
    _, exponent = torch.frexp(values.abs().amax(tuple(range(1, values.ndim)), keepdim=True))
    return exponent.clamp(-120, 120)


def _argmin(rows: Tensor, table: Tensor) -> Codes:
    """`argmin(rows @ table)` a tile of entries at a time, in numpy: 8 times as fast as torch's."""
    entries = table.shape[-1]
    if entries <= TILE_ENTRIES:
        lowest: Codes = torch.bmm(rows, table).numpy().argmin(axis=-1)
        return lowest
    best = np.full(rows.shape[:2], np.inf, np.float32)
    codes = np.zeros(rows.shape[:2], np.int64)
    for first in range(0, entries, TILE_ENTRIES):
        scores = torch.bmm(rows, table[..., first : first + TILE_ENTRIES]).numpy()
        found = scores.argmin(axis=-1)
        score = np.take_along_axis(scores, found[..., None], axis=-1)[..., 0]
        better = score < best
        best[better], codes[better] = score[better], found[better] + first
    return codes


def _seeds(block: _Block, entries: int, draws: npt.NDArray[np.float64]) -> Tensor:
    """First centroids by k-means++: each a point, drawn by its weighted error so far.

    The first is drawn by weight alone. `draws: [sets, rounds]` in [0, 1).
    """
    sets, count, length = block.points.shape
    centroids = torch.empty(sets, entries, length)
    errors = block.mass()
    rounds = draws.shape[1]
    for turn in range(rounds):
        first, last = turn * entries // rounds, (turn + 1) * entries // rounds
        sums = errors.cumsum(-1, dtype=torch.float64)
        # one draw a round, spread evenly over the errors: stratified, so few points come twice
        offsets = torch.arange(last - first) + torch.from_numpy(draws[:, turn, None])
        targets = offsets / (last - first) * sums[:, -1:]
        chosen = torch.searchsorted(sums, targets, right=True).clamp_(max=count - 1)
        centroids[:, first:last] = block.points[torch.arange(sets)[:, None], chosen]
        distances = block.distances(centroids[:, first:last])
        errors = distances if turn == 0 else torch.minimum(errors, distances)
    return centroids


def _lloyd(block: _Block, centroids: Tensor, iterations: int) -> Tensor:
    """Centroids after `iterations` of assignment and mean, or fewer where nothing changes."""
    before: Codes | None = None
    for _ in range(iterations):
        codes = block.nearest(centroids)
        if before is not None and np.array_equal(codes, before):
            break
        centroids, empty = block.means(codes, centroids)
        if empty.any():
            centroids = _reseed(block, centroids, codes, empty)
        before = codes
    return centroids


def _reseed(block: _Block, centroids: Tensor, codes: Codes, empty: npt.NDArray[np.bool_]) -> Tensor:
    """Put each set's j-th unused code on the farthest point of its cluster with j-th most error."""
    sets, entries, length = centroids.shape
    errors = point_errors(block.points, centroids, torch.from_numpy(codes), block.weights)
    error = errors.numpy().ravel()
    flat = (codes + np.arange(sets)[:, None] * entries).ravel()
    spent = np.bincount(flat, error, minlength=sets * entries).reshape(sets, entries)
    order = np.lexsort((error, flat))
    ends = order[np.flatnonzero(np.diff(flat[order], append=-1))]
    farthest = np.zeros(sets * entries, np.int64)
    farthest[flat[ends]] = ends
    heaviest = np.argsort(-spent, axis=1, kind="stable")
    donor = np.take_along_axis(heaviest, np.maximum(np.cumsum(empty, axis=1) - 1, 0), axis=1)
    useful = empty & (np.take_along_axis(spent, donor, axis=1) > 0)
    source = np.take_along_axis(farthest.reshape(sets, entries), donor, axis=1)
    moved = torch.from_numpy(useful)
    centroids[moved] = block.points.reshape(-1, length)[torch.from_numpy(source[useful])]
    return centroids
