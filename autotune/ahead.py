"""Compilation ahead of timing: GPU programs go to their compilers' disk caches in other processes.

A GPU kernel compiles in 0.1 to 20 s on the CPU and is timed for 0.1 s on the GPU, so a search waits
for compilers unless several run while the GPU is busy. Compilers have cores of their own: a launch
that waits for its core would be timed too. On a CPU, where kernels are timed on all cores and live
in the process that compiled them, nothing is compiled ahead.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence
from types import TracebackType

from autotune import workers
from autotune.workers import Outcome, Pool, Task
from vqkernels.device import Device
from vqkernels.kernel import find_kernel
from vqkernels.problem import Problem
from vqkernels.space import Config

__all__ = ["Ahead", "Cores", "divide"]

# The process that times on a GPU, and the one that searches meanwhile.
_TIMING_CORES = 2
# More compilers outrun the search, which knows a few configs of each kernel in advance.
_MOST_JOBS = 16


@dataclasses.dataclass(frozen=True)
class Cores:
    """The cores that this process may use: those to time on, and those to compile on meanwhile."""

    timing: frozenset[int]
    compiling: frozenset[int] = frozenset()


def divide(device: Device) -> Cores:
    """None to compile on where kernels are timed on all of them, or where there are too few."""
    ours = sorted(os.sched_getaffinity(0))
    if device.kind == "cpu" or len(ours) <= _TIMING_CORES:
        return Cores(frozenset(ours))
    return Cores(frozenset(ours[:_TIMING_CORES]), frozenset(ours[_TIMING_CORES:]))


class Ahead:
    """Compiles the configs that it is told of, for a problem on a device; `with` ends that.

    limit_s: for each. cores: to compile on; nothing is compiled where there are none.
    """

    def __init__(
        self, problem: Problem, device: Device, cores: frozenset[int], limit_s: float
    ) -> None:
        self._subject = problem, device, cores
        self._pool = Pool(min(len(cores), _MOST_JOBS), limit_s)
        self._enabled = bool(cores)
        self._waiting: collections.deque[Task] = collections.deque()
        self._outcomes: dict[tuple[str, Config], Outcome | None] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.__exit__(kind, error, trace)

    def tell(self, coming: Sequence[tuple[str, Config]]) -> None:
        """Kernels and configs that will be asked for, the next first; returns at once."""
        if not self._enabled:
            return
        for one in coming:
            if one not in self._outcomes:
                self._outcomes[one] = None
                self._waiting.append(Task(_compile, (*one, *self._subject)))
        self._go_on(0.0)

    def outcome(self, kernel: str, config: Config) -> Outcome | None:
        """How its compilation ended, once it has; None where nobody told of it."""
        asked = kernel, config
        if asked not in self._outcomes:
            return None
        # whoever asks is waiting: before all others
        self._waiting = collections.deque(
            sorted(self._waiting, key=lambda task: task.arguments[:2] != asked)
        )
        while (found := self._outcomes[asked]) is None:
            self._go_on()
        return found

    def _go_on(self, patience_s: float = float("inf")) -> None:
        self._fill()
        for outcome in self._pool.ended(patience_s):
            kernel, config = outcome.task.arguments[:2]
            self._outcomes[kernel, config] = outcome
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._pool.free:
            self._pool.start(self._waiting.popleft())


def _compile(
    kernel: str, config: Config, problem: Problem, device: Device, cores: frozenset[int]
) -> None:
    """Every program of a config, into the cache that the timing process reads."""
    os.sched_setaffinity(0, cores)
    found = find_kernel(kernel)
    workers.step("compile")
    for program in found.programs(config, problem) if found.programs else ():
        program.compile(int(device.arch.removeprefix("sm_")))
