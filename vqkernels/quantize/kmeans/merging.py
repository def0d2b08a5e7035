"""Entries that have become one."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vqkernels.quantize.kmeans.block import Flags

__all__ = ["near_equal"]

# Rows of distances at once: 64 MiB of them for 65,536 entries.
ROWS = 128


def near_equal(centroids: Tensor, distances: Tensor) -> Flags:
    """Entries nearer than `distances: [sets]` to one before them that stays: `[sets, entries]`."""
    freed = np.zeros(centroids.shape[:2], np.bool_)
    for book, distance, gone in zip(centroids.double(), distances.tolist(), freed, strict=True):
        squares = book.square().sum(-1)
        for first in range(0, len(book), ROWS):
            some = slice(first, first + ROWS)
            near = squares[some, None] + squares[first:] - 2 * book[some] @ book[first:].T
            close = (near < distance * distance).numpy()
            # an entry is near itself
            for row in np.flatnonzero(close.sum(1) > 1):
                if not gone[first + row]:
                    gone[first + row + 1 :] |= close[row, row + 1 :]
    return freed
