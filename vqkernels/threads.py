"""Threads that change nothing but the time: Python's over pieces, with torch held to one.

A product or a sum that a library splits between threads may round as it is split. So what must have
the same bits on any number of threads is cut in pieces that don't depend on it, each is computed on
one thread, and threads take pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar

import torch

__all__ = ["all_threads", "one_thread", "workers"]

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


@contextlib.contextmanager
def workers() -> Iterator[Executor]:
    """As many Python threads as torch has (outside of `one_thread`), with torch itself held to one.

    A tile of k-means takes 0.1 ms, so OpenMP's barrier a product cost more than its second thread
    gained (35 ms an iteration against 10 on a shared machine).
    """
    with all_threads() as threads, one_thread(), ThreadPoolExecutor(threads) as pool:
        yield pool
