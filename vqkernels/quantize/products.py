"""Linear algebra in float64 with the same bits on any number of threads.

A product that a library splits between threads may round as it is split. Here the split is fixed,
each piece runs on one thread, and threads take pieces: 2 threads halve the time and change nothing
else. What can't be cut this way (factoring, solving) runs on one thread: Cholesky and the inverse
of a 4096 x 4096 triangle take 1.2 s and 3.5 s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["all_threads", "one_thread", "product"]

# Rows of one piece: enough for a product to run at full speed, and 8 pieces of 4096 rows.
PIECE = 512

# Torch's number of threads outside of `one_thread`, inside of it.
_outside: ContextVar[int | None] = ContextVar("outside", default=None)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, for many small steps.

    OpenMP's threads wait for each other after each: on a busy machine, a step of 0.1 ms took 8.
    """
    threads = torch.get_num_threads()
    token = _outside.set(_outside.get() or threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _outside.reset(token)


@contextlib.contextmanager
def all_threads() -> Iterator[int]:
    """Inside of `one_thread`, the threads there were outside of it; gives their number."""
    inside = torch.get_num_threads()
    threads = _outside.get() or inside
    token = _outside.set(None)
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(inside)
        _outside.reset(token)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left: [rows, inner] @ right: [inner, columns]`, in pieces of rows."""
    with all_threads() as threads, one_thread():
        pieces = range(0, len(left), PIECE)
        if threads == 1 or len(pieces) < 2:
            return torch.cat([left[first : first + PIECE] @ right for first in pieces])
        with ThreadPoolExecutor(threads) as workers:
            found = workers.map(lambda first: left[first : first + PIECE] @ right, pieces)
            return torch.cat(list(found))
