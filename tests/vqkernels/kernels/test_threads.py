"""One pool for torch and numba, limits for both, and pinning that is undone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels.kernels.numba import threads

NUMBA_FIRST = """
import numba, numpy
@numba.njit(parallel=True)
def early(x):
    for i in numba.prange(x.size):
        x[i] = 1
numba.config.THREADING_LAYER = "omp"
early(numpy.zeros(4096))
from vqkernels.kernels.numba import threads
maps = open("/proc/self/maps").read().split()
copies = {word for word in maps if "libgomp" in word}
print(len(copies), threads.pool())
"""

COUNT_KEPT = """
import torch
torch.set_num_threads(1)
from vqkernels.kernels.numba import threads
import numba, numpy
threads._thread_ids(numpy.zeros(2, numpy.int64))
print(torch.get_num_threads())
"""


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one core: no pool to share")
def test_torch_and_numba_share_one_pool() -> None:
    code = "from vqkernels.kernels.numba import threads; print(threads.pool())"
    assert run_fresh(code) == "shared with torch"


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one core: no pool to share")
def test_numba_first_is_one_pool_or_noticed() -> None:
    copies, pool = run_fresh(NUMBA_FIRST).split(" ", 1)
    assert (pool == "shared with torch") == (copies == "1"), pool


def test_starting_numba_keeps_the_count_that_torch_was_given() -> None:
    assert run_fresh(COUNT_KEPT) == "1"


def test_limit_sets_both() -> None:
    import numba

    before = torch.get_num_threads()
    try:
        threads.limit(1)
        assert (torch.get_num_threads(), numba.get_num_threads()) == (1, 1)
    finally:
        threads.limit(before)
    assert torch.get_num_threads() == before


def test_pinning_is_undone() -> None:
    def affinities() -> dict[str, set[int]]:
        return {
            task.name: os.sched_getaffinity(int(task.name))
            for task in Path("/proc/self/task").iterdir()
        }

    threads.pool()  # the pool's threads exist from here on
    before = affinities()
    with threads.pinned() as pinned:
        during = affinities()
        assert not pinned or any(during[task] != before[task] for task in before)
    assert affinities() == before
