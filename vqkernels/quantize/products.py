"""Linear algebra in float64 with the same bits on any number of threads.

A product that a library splits between threads may round as it is split. Here the split is fixed,
each piece runs on one thread, and threads take pieces: 2 threads halve the time and change nothing
else. What can't be cut this way (factoring, solving) runs on one thread: Cholesky and the inverse
of a 4096 x 4096 triangle take 1.2 s and 3.5 s.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vqkernels.threads import all_threads, one_thread

__all__ = ["product"]

# Rows of one piece: enough for a product to run at full speed, and 8 pieces of 4096 rows.
PIECE = 512


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left: [rows, inner] @ right: [inner, columns]`, in pieces of rows."""
    with all_threads() as threads, one_thread():
        pieces = range(0, len(left), PIECE)
        if threads == 1 or len(pieces) < 2:
            return torch.cat([left[first : first + PIECE] @ right for first in pieces])
        with ThreadPoolExecutor(threads) as workers:
            found = workers.map(lambda first: left[first : first + PIECE] @ right, pieces)
            return torch.cat(list(found))
