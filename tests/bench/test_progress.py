"""The bar of a search: its text, and when a stage ends."""

from __future__ import annotations

import datetime
import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from autotune.measurement import Measurement
from autotune.store import Attempt, Key
from autotune.tune import Choice, Progress
from bench import progress
from bench.progress import Left, Pace, describe
from vqkernels.space import Config

BEST = Choice("numba/table", "s", Config())
NOW = datetime.datetime.now(datetime.UTC)


def made(after_s: float) -> Attempt:
    """An attempt that ended so long after this test began, or before it."""
    finished = (NOW + datetime.timedelta(seconds=after_s)).isoformat(timespec="milliseconds")
    key = Key(BEST.kernel, BEST.source, BEST.config)
    return Attempt(key, Measurement(status="runtime", reason="told"), "", finished)


OLD, NEW = made(-3600), made(3600)


def at(done: int, total: int, last: Attempt = NEW, stage: str = "search") -> Progress:
    return Progress(stage, done, total, last, None, None, None)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("best_s", "floor_s", "text"),
    [
        (None, None, "finals"),
        (622.84e-6, None, "finals, best numba/table 622.8 us"),
        (622.84e-6, 273e-6, "finals, best numba/table 622.8 us, 44% of the floor"),
    ],
)
def test_the_stage_the_best_and_its_share_of_the_floor(best_s, floor_s, text: str) -> None:
    best = None if best_s is None else BEST
    assert describe(Progress("finals", 1, 2, None, best, best_s, floor_s)) == text


def test_a_stage_ends_as_its_own_attempts_say() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    clock.now_s += 4
    assert pace.end_s(at(1, 10)) == 1004 + 9 * 4
    clock.now_s += 2
    assert pace.end_s(at(2, 10)) == 1006 + 8 * 3
    clock.now_s += 50
    assert pace.end_s(at(1, 3, stage="finals")) == 1056 + 2 * 50


def test_what_the_store_had_tells_nothing_of_the_pace() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    for done in range(1, 61):
        assert pace.end_s(at(done, 100, OLD)) is None
    clock.now_s += 5
    assert pace.end_s(at(61, 100)) == 1005 + 39 * 5


def test_the_last_attempts_count() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    end = None
    for done in range(1, 61):
        clock.now_s += 100 if done <= 40 else 1
        end = pace.end_s(at(done, 100))
    assert end == clock.now_s + 40


def test_pairs_count_when_both_are_made() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    end = None
    for done in (1, 1, 2, 2):
        clock.now_s += 3
        end = pace.end_s(at(done, 7, stage="confirmation"))
    assert end == clock.now_s + 5 * 6


def test_a_search_ends_by_its_minutes_and_the_finals_do_not() -> None:
    clock = Clock()
    pace = Pace(60.0, clock)
    assert pace.end_s(at(1, 100, OLD)) == 1060
    clock.now_s += 10
    assert pace.end_s(at(2, 100)) == 1060, "98 attempts of 10 s don't fit"
    assert pace.end_s(at(99, 100)) == pytest.approx(1010 + 10 / 98), "few are left"
    clock.now_s += 30
    assert pace.end_s(at(1, 9, stage="finals")) == 1040 + 8 * 30


def test_the_time_left_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    console = Console(file=io.StringIO(), width=80)
    bar = Bar(Left(), console=console)
    task = bar.add_task("", total=100)

    def shown() -> str:
        return Left()(bar.tasks[0]).plain

    assert shown() == "-:--:--"
    bar.update(task, end_s=1000.0 + 3725)
    assert shown() == "1:02:05"
    clock.now_s += 65
    assert shown() == "1:01:00"
    clock.now_s += 9999
    assert shown() == "0:00:00"
