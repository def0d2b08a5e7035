"""One thread pool for torch and numba.

Two OpenMP pools in a process spin against each other: after a parallel region its threads poll
for the next one for milliseconds, on the cores that the other pool wants. On two cores that made
a 5 ms numba region take 24 ms right after a torch one.

So there is one pool, torch's. torch loads its libgomp into the global symbol scope when it is
imported; numba's `omp` layer asks for `GOMP_parallel` by that name and, loaded later, binds to
torch's copy. `import torch` before the first numba launch is all it takes, and this module does
it. (The other way round, torch 2.13 takes the libgomp that is already there; builds that carry
theirs under another name don't, and `pool` says so.) No thread of ours exists, so idle threads
can't spin against anything.

One runtime means one setting: when numba starts its threads it sets the runtime's thread count,
which is torch's too. They are started here, once, and torch's count is put back. Pinning is for
measurement only.
"""

# mypy: ignore-errors
# the njit functions are typed by numba's inference

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import torch

__all__ = ["limit", "pinned", "pool"]

# gettid(2) has no glibc wrapper before 2.30; as a C function numba can call it inside prange
_GETTID = getattr(ctypes.CDLL(None), "gettid", None)
if _GETTID is not None:
    _GETTID.restype, _GETTID.argtypes = ctypes.c_int, []


def _choose_layer() -> None:
    # omppool links to the system's libgomp.so.1.0.0 and can't load without it
    with contextlib.suppress(ImportError):
        importlib.import_module("numba.np.ufunc.omppool")
        numba.config.THREADING_LAYER = "omp"


def _start() -> None:
    count = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(count)


_choose_layer()
_start()


@numba.njit(parallel=True)
def _thread_ids(ids):
    for i in numba.prange(ids.size):
        ids[i] = _GETTID()


def pool() -> str:
    """The pool that numba's launches run on: `shared with torch`, or why it is not."""
    torch.ones(1 << 20).add_(1)  # starts torch's threads: numba's must be among them
    before = {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
    ids = np.zeros(numba.get_num_threads(), np.int64)
    _thread_ids(ids)
    if numba.threading_layer() != "omp":
        return f"numba's own ({numba.threading_layer()}): install the system's libgomp"
    if not _torch_first() or not before.issuperset(ids.tolist()):
        return "numba's own (omp): import torch or vqkernels before the first numba launch"
    return "shared with torch"


def _torch_first() -> bool:
    """Whether torch's OpenMP was loaded before numba's layer looked for one."""
    names: list[str] = []

    def visit(info, size, data):
        # struct dl_phdr_info: the load address, then the path
        names.append(ctypes.cast(info, ctypes.POINTER(ctypes.c_char_p))[1].decode())
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(callback(visit), None)  # in the order of loading
    runtime = [i for i, name in enumerate(names) if "/torch/" in name and "gomp" in name]
    layer = [i for i, name in enumerate(names) if "omppool" in name]
    return not runtime or not layer or runtime[0] < layer[0]


def limit(threads: int) -> None:
    """Use `threads` threads, in torch and numba alike."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)


@contextlib.contextmanager
def pinned() -> Iterator[bool]:
    """Hold each thread of the pool on a core of its own; yields whether that was possible.

    For measurement: the scheduler moves threads between samples otherwise. Restored on leaving,
    since a thread made meanwhile would inherit the caller's single core.
    """
    cores = sorted(os.sched_getaffinity(0))
    ids = np.zeros(numba.get_num_threads(), np.int64)
    if _GETTID is None or len(ids) > len(cores):
        yield False
        return
    _thread_ids(ids)
    threads = sorted(set(ids.tolist()))
    try:
        for thread, core in zip(threads, cores, strict=False):
            os.sched_setaffinity(thread, {core})
        yield len(threads) == len(ids)
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, set(cores))
