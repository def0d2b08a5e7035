"""The bar of a search: what it says, and when the stage that it shows will end."""

from __future__ import annotations

import collections
import datetime
import time
from collections.abc import Callable

from rich.progress import ProgressColumn, Task
from rich.text import Text

from autotune.tune import Progress

__all__ = ["Left", "Pace", "describe"]

# Attempts whose mean time says how long the next take: kernels differ, and so do the configs that
# a strategy asks for early and late.
_LAST = 20


def describe(now: Progress) -> str:
    """The stage, and the best so far beside the least time that it could take."""
    if now.best is None or now.best_s is None:
        return now.stage
    best = f"{now.stage}, best {now.best.kernel} {now.best_s * 1e6:.4g} us"
    return best if now.floor_s is None else f"{best}, {now.floor_s / now.best_s:.0%} of the floor"


class Pace:
    """When a stage ends, by what its attempts took here; those of an earlier run took no time.

    search_s: what the search may take at most, counted from now.
    """

    def __init__(
        self, search_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._seen_s = clock, clock()
        self._began = datetime.datetime.now(datetime.UTC)
        self._deadline_s = None if search_s is None else self._seen_s + search_s
        self._stage, self._done = "", 0
        self._steps: collections.deque[tuple[float, int]] = collections.deque(maxlen=_LAST)

    def end_s(self, now: Progress) -> float | None:
        """The clock's time at which the stage ends; None where nothing tells yet."""
        at = self._clock()
        if now.stage != self._stage:
            self._stage, self._done = now.stage, 0
            self._steps.clear()
        if (
            now.last is not None
            and datetime.datetime.fromisoformat(now.last.finished) > self._began
        ):
            self._steps.append((at - self._seen_s, now.done - self._done))
        self._seen_s, self._done = at, now.done
        ends = [self._deadline_s] if now.stage == "search" and self._deadline_s is not None else []
        if steps := sum(count for _, count in self._steps):
            taken_s = sum(seconds for seconds, _ in self._steps)
            ends.append(at + (now.total - now.done) * taken_s / steps)
        return min(ends, default=None)


class Left(ProgressColumn):
    """What is left until a task's `end_s`, counted down between two updates."""

    def render(self, task: Task) -> Text:
        """Hours, minutes and seconds."""
        end_s = task.fields.get("end_s")
        if end_s is None:
            return Text("-:--:--", style="progress.remaining")
        left = datetime.timedelta(seconds=max(0, round(end_s - time.monotonic())))
        return Text(str(left), style="progress.remaining")
