"""Threads that change nothing but the time: Python's over tiles, with torch held to one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

__all__ = ["workers"]


@contextlib.contextmanager
def workers() -> Iterator[Executor]:
    """As many Python threads as torch has, with torch itself held to one.

    A product that is split otherwise may round otherwise; and OpenMP's barrier costs more than
    its second thread gains on tiles of 0.1 ms.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
