"""Timers: how long one call takes, on weights that are not in cache.

A 4096 x 4096 layer at 2 bits is 4 MB and would sit in any last-level cache, so a loop over one
weight measures the cache. `cold_copies` says how many copies to rotate over. x and out stay hot,
as they are in a decoder: the layer before has just written x.

A GPU's time is taken from events that the GPU itself records, behind a kernel that spins: while it
spins the host queues everything, so that no launch is waited for. A batch of which the host was
still queueing when the spin ended is no measurement, and is taken again behind a longer spin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch

from autotune.measurement import Timer, Timing
from vqkernels.device import Device

__all__ = [
    "Budget",
    "Samples",
    "Turns",
    "capture",
    "cold_copies",
    "default_timer",
    "keep_busy",
    "pinned_threads",
    "set_threads",
    "take_samples",
    "taking_turns",
]

Calls = Sequence[Callable[[], None]]

# No SM clock is higher, so that a spin never ends before its time.
_SPIN_HZ = 2.2e9
# A host that isn't ahead of a spin of 2 s never will be: the call itself waits for the GPU.
_LONGEST_SPIN_S = 2.0
# Calls between two synchronisations: enough that one spin serves many, few enough to stop in time.
_BATCH_CALLS, _BATCH_S = 16, 2e-3
# Enough to tell that a config is several times too slow.
_FEW_SAMPLES = 3
# A turn: a shared machine is slow for tens of milliseconds to some seconds at a time.
_SLICE_S = 0.01
# A replay is so long at least, so that the microseconds before its first kernel are nothing.
_REPLAY_S = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop: after `max_samples`, or after `seconds` once `min_samples` are there.

    longest_call_s: what takes longer is not timed at all. give_up_s: a call that was never faster
    in its first samples is hopeless, and gets no more.
    """

    warmup_s: float = 0.05
    seconds: float = 0.3
    min_samples: int = 7
    max_samples: int = 200
    longest_call_s: float | None = None
    give_up_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds of each call, how they were taken, and `replay`: of the graph, where there is one."""

    seconds: list[float]
    timing: Timing
    replay: Callable[[], None] | None = None


class Turns(Protocol):
    """Whose turn it is to take samples, of processes that are compared."""

    def wait(self) -> None:
        """Until it is this process's turn, which ends where it waits again or is done."""

    def done(self) -> None:
        """No more turns are wanted: wait until nobody wants one."""


@contextlib.contextmanager
def taking_turns(turns: Turns) -> Iterator[None]:
    """Within, `take_samples` takes a slice of its samples a turn."""
    global _turns
    _turns = turns
    try:
        yield
    finally:
        _turns = None


_turns: Turns | None = None


def _slices(budget: Budget) -> Iterator[Budget]:
    """The parts of a budget; each warms up anew, since another's turn has used the caches."""
    if _turns is None:
        yield budget
        return
    count = max(1, math.ceil(budget.seconds / _SLICE_S))
    part = dataclasses.replace(
        budget,
        warmup_s=budget.warmup_s / count,
        seconds=budget.seconds / count,
        min_samples=math.ceil(budget.min_samples / count),
        max_samples=math.ceil(budget.max_samples / count),
    )
    for _ in range(count):
        _turns.wait()
        yield part
    _turns.done()


def cold_copies(nbytes: int, device: Device) -> int:
    """Copies of a weight that exceed twice the last-level cache, within a quarter of memory."""
    if nbytes == 0:
        return 1  # nothing to keep out of a cache
    wanted = max(2, math.ceil(2 * device.llc_bytes / nbytes) + 1)
    return max(1, min(wanted, device.memory_bytes // 4 // nbytes))


def default_timer(device: Device) -> Timer:
    """The timer of single calls: on a GPU events, on a CPU its clock."""
    return "cuda_event" if device.kind == "cuda" else "perf_counter"


def take_samples(
    calls: Calls, device: Device, budget: Budget, *, cold: bool, timer: Timer | None = None
) -> Samples:
    """Time `calls`, going round them; `timer`: the device's default where None.

    Each of `calls` runs the same kernels on a copy of its own; one call is one sample, except with
    `cuda_graph`, where a sample is the mean over a replay. Raises RuntimeError where a call waits
    for the GPU or can't be captured.
    """
    timer = timer or default_timer(device)
    if timer == "perf_counter":
        return _cpu_samples(calls, budget, cold)
    with torch.cuda.device(device.index):
        if timer == "cuda_graph":
            return _graph_samples(calls, budget, cold)
        return _event_samples(calls, budget, cold)


def capture(calls: Calls) -> Any:
    """A CUDA graph of `calls` on the current device; each must have run before.

    They run once more, on a stream beside the current one, as torch asks before a capture.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def keep_busy(seconds: float) -> None:
    """Queue a kernel that keeps the current stream busy for so long at least."""
    torch.cuda._sleep(round(seconds * _SPIN_HZ))  # type: ignore[no-untyped-call]


def _cpu_samples(calls: Calls, budget: Budget, cold: bool) -> Samples:
    with pinned_threads() as pinned:
        turns = itertools.cycle(calls)
        samples: list[float] = []
        for part in _slices(budget):
            _warm_up(turns, part)
            samples += _part(lambda: [_clocked(next(turns))], part)
    timing = Timing(
        timer="perf_counter",
        warmup_s=budget.warmup_s,
        copies=len(calls),
        cache=_cache_state(cold),
        threads=torch.get_num_threads(),
        pinned=pinned,
    )
    return Samples(samples, timing)


def _clocked(call: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9


def _part(take: Callable[[], list[float]], budget: Budget) -> list[float]:
    """Samples until the budget is spent; `take` gives the next ones."""
    samples: list[float] = []
    end = time.perf_counter() + budget.seconds
    while _more(samples, budget, end):
        samples += take()
    return samples


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


def _warm_up(
    turns: Iterator[Callable[[], None]], budget: Budget, wait: Callable[[], None] = lambda: None
) -> None:
    """Calls for the budget's time, each waited for: a queue of them would outlast it."""
    end, done = time.perf_counter() + budget.warmup_s, False
    while not done:
        next(turns)()
        wait()
        done = time.perf_counter() >= end


def _more(samples: list[float], budget: Budget, end: float) -> bool:
    hopeless = budget.give_up_s is not None and min(samples, default=0.0) > budget.give_up_s
    if hopeless and len(samples) >= _FEW_SAMPLES:
        return False
    if len(samples) < budget.min_samples:
        return True
    return len(samples) < budget.max_samples and time.perf_counter() < end


def _cache_state(cold: bool) -> dict[str, Literal["hot", "cold"]]:
    weight: Literal["hot", "cold"] = "cold" if cold else "hot"
    return {"codes": weight, "codebooks": weight, "sides": weight, "x": "hot", "out": "hot"}


def _event_samples(calls: Calls, budget: Budget, cold: bool) -> Samples:
    """One call between two events; the spin before a batch keeps launches out of it."""
    turns = itertools.cycle(calls)
    samples: list[float] = []
    spin, batch = _Spin(), 1

    def take() -> list[float]:
        nonlocal batch
        seconds = spin.time(turns, batch)
        batch = max(1, min(_BATCH_CALLS, int(_BATCH_S / max(min(seconds), 1e-6))))
        return seconds

    for part in _slices(budget):
        _warm_up(turns, part, torch.cuda.synchronize)
        samples += _part(take, part)
    timing = Timing(
        timer="cuda_event",
        warmup_s=budget.warmup_s,
        copies=len(calls),
        cache=_cache_state(cold),
    )
    return Samples(samples, timing)


def _graph_samples(calls: Calls, budget: Budget, cold: bool) -> Samples:
    """Replays of one graph that goes round `calls` until it is long enough to be timed."""
    turns = itertools.cycle(calls)
    _warm_up(turns, budget, torch.cuda.synchronize)
    spin = _Spin()
    call_s = max(min(spin.time(turns, _BATCH_CALLS)), 1e-6)
    rounds = max(1, math.ceil(_REPLAY_S / (call_s * len(calls))))
    graph = capture([*calls] * rounds)
    number = rounds * len(calls)
    replays = itertools.repeat(graph.replay)
    spin.time(replays, 1)  # the first replay uploads the graph
    samples: list[float] = []
    for part in _slices(budget):
        samples += _part(lambda: [taken / number for taken in spin.time(replays, 2)], part)
    timing = Timing(
        timer="cuda_graph",
        warmup_s=budget.warmup_s,
        copies=len(calls),
        cache=_cache_state(cold),
    )
    return Samples(samples, timing, graph.replay)


class _Spin:
    """Steps between events, behind a spinning kernel that lasts until all of them are queued."""

    def __init__(self) -> None:
        self._seconds = 0.5e-3

    def time(self, steps: Iterator[Callable[[], None]], number: int) -> list[float]:
        """Seconds that each of the next `number` steps takes on the GPU."""
        while self._seconds <= _LONGEST_SPIN_S:
            keep_busy(self._seconds)
            spun = _event()
            spun.record()
            pairs = [_between_events(next(steps)) for _ in range(number)]
            ahead = not spun.query()
            torch.cuda.synchronize()
            if ahead:
                return [start.elapsed_time(stop) * 1e-3 for start, stop in pairs]
            self._seconds *= 2
        raise RuntimeError("a call waits for the GPU, so events can't time it behind queued work")


def _between_events(step: Callable[[], None]) -> tuple[Any, Any]:
    start, stop = _event(), _event()
    start.record()
    step()
    stop.record()
    return start, stop


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
