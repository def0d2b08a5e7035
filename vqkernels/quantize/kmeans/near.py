"""The nearest of many entries, by looking only at those near to a good guess.

Where a point lies u from some entry, no entry farther than 2u from that one is nearer to it (the
triangle inequality, as in Elkan 2003, "Using the triangle inequality to accelerate k-means"). Of
65,536 entries of normal vectors of 8 some hundreds are left, so points are gathered by the entry
guessed for them and compared with what lies around it. Distances between entries are found a few
rows at a time, and never kept.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

__all__ = ["nearest_of_many"]

# Entries whose neighbours are found at once: 2 MiB of distances to 65,536 others.
ROWS = 8
# Points of one entry compared at once, the nearest to it first: each lot has a bound of its own.
LOT = 64
# Error of a squared distance in float32, over the square of the lengths it is the difference of;
# ten times what it comes to.
ROUNDING = 1e-5

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def nearest_of_many(points: Floats, entries: Floats, guess: Codes, workers: Executor) -> Codes:
    """Number of the nearest of `entries: [entries, length]` to each of `points: [count, length]`.

    guess: the number of an entry for each point, the nearer the faster. The lowest number where
    squared distances, computed as `|c|^2 - 2xc` in float32, are equal.
    """
    radius = _distances(points, entries, guess)
    order = radius.argsort(kind="stable")
    # numpy's radix sort is for 16 bits: 10 times as fast as its other stable one
    small = guess.astype(np.uint16) if len(entries) <= 1 << 16 else guess
    order = order[small[order].argsort(kind="stable")]
    bounds = np.searchsorted(guess[order], np.arange(len(entries) + 1))
    squares = np.square(entries).sum(1)
    table = np.concatenate([-2 * entries, squares[:, None]], axis=1)
    across = np.ascontiguousarray(table.T)
    rows = np.concatenate([points, np.ones((len(points), 1), np.float32)], axis=1)
    codes = np.empty(len(points), np.int64)

    def search(first: int) -> None:
        some = np.arange(first, min(first + ROWS, len(entries)))
        some = some[bounds[some + 1] > bounds[some]]
        ones = np.ones((len(some), 1), np.float32)
        # squared distances but for the row's own square, which goes into the bound
        apart = np.concatenate([entries[some], ones], axis=1) @ across
        for entry, away in zip(some, apart, strict=True):
            own = order[bounds[entry] : bounds[entry + 1]]
            for start in range(0, len(own), LOT):
                lot = own[start : start + LOT]
                most = 2 * radius[lot[-1]]
                slack = ROUNDING * (np.sqrt(squares[entry]) + most) ** 2
                near = np.flatnonzero(away <= most * most - squares[entry] + slack)
                scores = rows.take(lot, axis=0) @ table.take(near, axis=0).T
                codes[lot] = near[scores.argmin(axis=1)]

    # a product of a few rows is too short to be shared among threads, and could round otherwise
    with threadpool_limits(1, "blas"):
        for _ in workers.map(search, range(0, len(entries), ROWS)):
            pass
    return codes


def _distances(points: Floats, entries: Floats, codes: Codes) -> Floats:
    """Distance of each point to its entry, from the differences."""
    squares = np.zeros(len(points), np.float32)
    for j in range(points.shape[1]):
        squares += np.square(points[:, j] - entries[codes, j])
    return np.sqrt(squares)
