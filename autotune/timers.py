"""Timers: how long one call takes, on weights that are not in cache.

A 4096 x 4096 layer at 2 bits is 4 MB and would sit in any last-level cache, so a loop over one
weight measures the cache. `cold_copies` says how many copies to rotate over. x and out stay hot,
as they are in a decoder: the layer before has just written x.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from autotune.measurement import Timing
from vqkernels.device import Device

__all__ = ["Budget", "cold_copies", "pinned_threads", "set_threads", "take_samples"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop: after `max_samples`, or after `seconds` once `min_samples` are there."""

    warmup_s: float = 0.05
    seconds: float = 0.3
    min_samples: int = 7
    max_samples: int = 200


def cold_copies(nbytes: int, device: Device) -> int:
    """Copies of a weight that exceed twice the last-level cache, within a quarter of memory."""
    if nbytes == 0:
        return 1  # nothing to keep out of a cache
    wanted = max(2, math.ceil(2 * device.llc_bytes / nbytes) + 1)
    return max(1, min(wanted, device.memory_bytes // 4 // nbytes))


def take_samples(
    calls: Sequence[Callable[[], None]], device: Device, budget: Budget, *, cold: bool
) -> tuple[list[float], Timing]:
    """Seconds of each call, going round `calls`, and how they were taken.

    Each of `calls` runs the same kernel on a copy of its own; one call is one sample.
    """
    if device.kind == "cuda":
        return _cuda_samples(calls, device, budget, cold=cold)
    with pinned_threads() as pinned:
        turn = _warm_up(calls, budget)
        samples: list[float] = []
        end = time.perf_counter() + budget.seconds
        while _more(samples, budget, end):
            call = calls[turn % len(calls)]
            start = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - start) * 1e-9)
            turn += 1
    timing = Timing(
        timer="perf_counter",
        warmup_s=budget.warmup_s,
        copies=len(calls),
        cache=_cache_state(cold),
        threads=torch.get_num_threads(),
        pinned=pinned,
    )
    return samples, timing


def set_threads(threads: int) -> None:
    """Use `threads` CPU threads everywhere: torch's pool, which numba shares where installed."""
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        from vqkernels.kernels.numba import threads as numba_threads

        numba_threads.limit(threads)


@contextlib.contextmanager
def pinned_threads() -> Iterator[bool]:
    """Pin the pool's threads where numba can tell which they are; yields whether they are."""
    try:
        from vqkernels.kernels.numba.threads import pinned
    except ImportError:
        yield False
        return
    with pinned() as done:
        yield done


def _warm_up(calls: Sequence[Callable[[], None]], budget: Budget) -> int:
    turn, end = 0, time.perf_counter() + budget.warmup_s
    while turn == 0 or time.perf_counter() < end:
        calls[turn % len(calls)]()
        turn += 1
    return turn


def _more(samples: list[float], budget: Budget, end: float) -> bool:
    if len(samples) < budget.min_samples:
        return True
    return len(samples) < budget.max_samples and time.perf_counter() < end


def _cache_state(cold: bool) -> dict[str, Literal["hot", "cold"]]:
    weight: Literal["hot", "cold"] = "cold" if cold else "hot"
    return {"codes": weight, "codebooks": weight, "sides": weight, "x": "hot", "out": "hot"}


def _cuda_samples(
    calls: Sequence[Callable[[], None]], device: Device, budget: Budget, *, cold: bool
) -> tuple[list[float], Timing]:
    """Events behind queued work: the host runs ahead, so a launch's latency isn't measured."""
    turn = _warm_up(calls, budget)
    torch.cuda.synchronize(device.index)
    samples: list[float] = []
    end = time.perf_counter() + budget.seconds
    while _more(samples, budget, end):
        # 16 calls queued between two synchronisations keep the GPU busy before every event
        pairs = []
        for _ in range(16):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            calls[turn % len(calls)]()
            stop.record()
            pairs.append((start, stop))
            turn += 1
        torch.cuda.synchronize(device.index)
        samples += [start.elapsed_time(stop) * 1e-3 for start, stop in pairs]
    timing = Timing(
        timer="cuda_event",
        warmup_s=budget.warmup_s,
        copies=len(calls),
        cache=_cache_state(cold),
    )
    return samples, timing
