"""The loop: what wins, what it survives, how it goes on after a kill."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from autotune import trial
from autotune.candidates import enumerate_space
from autotune.measurement import Correctness, Measurement
from autotune.store import Store
from autotune.timers import Budget
from autotune.trial import Processes, Recipe
from autotune.tune import Arm, Choice, Plan, Progress, tune
from tests.autotune import faulty
from vqkernels.presets import PRESETS
from vqkernels.space import Config, Param, Space

ROOT = Path(__file__).resolve().parents[2]
RIGHT = Correctness(worst=0.1, max_abs=0.0, relative_rms=0.0, controls={})
LIMITS = {"subject": 60.0, "compile": 5.0, "check": 5.0, "time": 10.0}


def arm(kernel: str, space: Space, default: Config, **fields) -> Arm:
    return Arm(kernel, "hash of " + kernel, enumerate_space(space), default, **fields)


class Recorded:
    """Times by formula: no device, no noise; each call is counted."""

    def __init__(self, seconds) -> None:
        self._seconds = seconds
        self.calls: list[tuple[str, Config]] = []
        self.begun = 0

    def measure(self, kernel, config, give_up_s=None):
        self.calls.append((kernel, config))
        seconds = self._seconds(kernel, config)
        if seconds is None:
            return Measurement(status="runtime", reason="no such config"), "its log"
        return Measurement(status="ok", samples_s=(seconds,) * 3, correctness=RIGHT), ""

    def fresh(self) -> None:
        self.begun += 1


GRID = Space(
    params=(
        Param("a", tuple(range(12)), "far from 7"),
        Param("b", tuple(range(12)), "far from 3"),
    )
)
START = Config(a=0, b=0)


def bowl(kernel: str, config: Config) -> float | None:
    """Fastest at a = 7, b = 3; one in six fails; `slow` is three times as slow."""
    a, b = config.number("a"), config.number("b")
    if (a * 5 + b) % 6 == 1:
        return None
    return 1e-3 * (1 + (a - 7) ** 2 + (b - 3) ** 2) * (3 if kernel == "slow" else 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return opened(f"sqlite:///{tmp_path / 'tuning.sqlite'}")


def opened(url: str) -> Store:
    """A store with the subjects 1 and 2."""
    one = Store(url)
    assert [one.subject({"number": number}) for number in (1, 2)] == [1, 2]
    return one


def plan(**fields) -> Plan:
    """Random search: what is tested here is the loop."""
    return Plan(strategy="random", **fields)


def arms(*kernels: str) -> list[Arm]:
    return [arm(kernel, GRID, START) for kernel in kernels]


def test_the_fastest_wins_and_is_confirmed(store: Store) -> None:
    both, evaluator, seen = arms("fast", "slow"), Recorded(bowl), []
    baseline = both[1].choice(START)
    chosen = plan(attempts=200)
    result = tune(both, baseline, evaluator, store, 1, chosen, seen.append)
    assert result.winner == Choice("fast", "hash of fast", Config(a=7, b=3))
    assert result.faster
    assert result.judgement.ratio == pytest.approx(1e-3 / bowl("slow", START))
    stages = Counter(one.stage for one in seen)
    assert stages["finals"] == 4 * 9, "eight finalists and the baseline, four rounds"
    assert stages["confirmation"] == 14
    assert evaluator.begun == 4 + 14, "a process a round, and one for each of a pair"
    last: Progress = seen[-1]
    assert (last.best, last.best_s) == (result.winner, 1e-3)


def test_an_arm_that_is_far_behind_gets_no_more(store: Store) -> None:
    def seconds(kernel: str, config: Config) -> float:
        return {"fast": 1e-3, "slow": 1e-2}[kernel]

    both, evaluator = arms("slow", "fast"), Recorded(seconds)
    tune(both, both[0].choice(START), evaluator, store, 1, plan(attempts=60, rounds=0, pairs=0))
    attempts = Counter(kernel for kernel, _ in evaluator.calls)
    assert attempts["slow"] <= 10
    assert attempts["slow"] + attempts["fast"] == 60


def promising(*kernels: str) -> list[Arm]:
    """Arms that begin with the two ends of a row."""
    ends = (Config(a=7, b=3), Config(a=11, b=0))
    return [arm(kernel, GRID, START, first=ends) for kernel in kernels]


def test_promising_configs_are_tried_before_the_strategy_chooses(store: Store) -> None:
    both, evaluator = promising("fast", "slow"), Recorded(bowl)
    baseline = both[0].choice(START)
    tune(both, baseline, evaluator, store, 1, plan(attempts=80, rounds=0, pairs=0))
    best, other = both[0].first
    assert evaluator.calls[:6] == [
        (kernel, config) for config in (START, best, other) for kernel in ("fast", "slow")
    ]
    assert len(set(evaluator.calls)) == len(evaluator.calls) == 80


def test_promising_configs_keep_to_the_budget_and_may_be_pruned(store: Store) -> None:
    both, evaluator = promising("fast", "slow"), Recorded(bowl)
    baseline, (best, other) = both[0].choice(START), both[0].first
    tune(both, baseline, evaluator, store, 1, plan(attempts=3, rounds=0, pairs=0))
    assert evaluator.calls[2:] == [("fast", best)]
    pruned = [
        dataclasses.replace(one, prune=lambda config, _: "no" if config == best else None)
        for one in both
    ]
    evaluator = Recorded(bowl)
    tune(pruned, baseline, evaluator, store, 2, plan(attempts=4, rounds=0, pairs=0))
    assert evaluator.calls[2:] == [("fast", other), ("slow", other)]


def test_ties_keep_the_default_or_the_simpler(store: Store) -> None:
    one = arms("only")
    start = one[0].choice(START)
    result = tune(one, start, Recorded(lambda *_: 1e-3), store, 1, plan(attempts=30))
    assert (result.winner, result.judgement, result.faster) == (start, None, False)

    def nearly(kernel: str, config: Config) -> float:
        changed = config.number("a") + config.number("b")
        return 2e-3 if config == START else 1e-3 * (1 - 1e-6 * changed)

    again = tune(one, start, Recorded(nearly), store, 2, plan(attempts=144, finalists=144))
    assert sum(value != 0 for value in again.winner.config.values()) == 1


def test_what_is_pruned_is_counted_and_never_measured(store: Store) -> None:
    def prune(config: Config, best_s: float | None) -> str | None:
        return "b is too large" if config.number("b") > 5 else None

    (one,) = (arm("only", GRID, START, prune=prune),)
    evaluator = Recorded(bowl)
    result = tune([one], one.choice(START), evaluator, store, 1, plan(attempts=200))
    assert result.pruned == {"b is too large": 12 * 6}
    assert all(config.number("b") <= 5 for _, config in evaluator.calls)
    assert result.winner.config == Config(a=7, b=3)


def test_a_baseline_that_fails_is_no_finalist(store: Store) -> None:
    one = arms("only")
    bad = one[0].choice(Config(a=0, b=1))
    assert bowl("only", bad.config) is None
    result = tune(one, bad, Recorded(bowl), store, 1, plan(attempts=200))
    assert bad not in result.seconds
    assert (result.winner.config, result.judgement) == (Config(a=7, b=3), None)


def test_what_was_measured_is_not_measured_again(store: Store) -> None:
    both = arms("fast", "slow")
    baseline = both[0].choice(START)
    first = tune(both, baseline, Recorded(bowl), store, 1, plan(attempts=40))
    evaluator = Recorded(bowl)
    assert tune(both, baseline, evaluator, store, 1, plan(attempts=40)) == first
    assert evaluator.calls == []
    assert evaluator.begun == 0
    tune(both, baseline, evaluator, store, 1, plan(attempts=50, rounds=0, pairs=0))
    assert len(evaluator.calls) == 10, "a longer search goes on where the first ended"


def test_a_failed_attempt_gives_its_claim_back(store: Store) -> None:
    class Interrupted(Recorded):
        def measure(self, *_):
            raise KeyboardInterrupt

    one = arms("only")
    with pytest.raises(KeyboardInterrupt):
        tune(one, one[0].choice(START), Interrupted(bowl), store, 1, plan(attempts=3))
    assert store.attempts(1) == []
    evaluator = Recorded(bowl)
    tune(one, one[0].choice(START), evaluator, store, 1, plan(attempts=3, rounds=0, pairs=0))
    assert len(evaluator.calls) == 3


CHILD = """
import sys, time
from autotune.tune import tune
from tests.autotune.test_tune import START, Recorded, arms, bowl, opened, plan

class Slow(Recorded):
    def measure(self, *call):
        time.sleep(0.004)
        return super().measure(*call)

both = arms("fast", "slow")
result = tune(both, both[1].choice(START), Slow(bowl), opened(sys.argv[1]), 1, plan(attempts=60))
print(dict(result.winner.config))
"""


def killed(url: str, after_s: float) -> bool:
    """Whether a child that tunes was killed before it ended."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        child.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        return True
    return False


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.sweep)])
def test_kills_lose_no_attempt_and_change_no_winner(tmp_path: Path, kills: int) -> None:
    """Killed at random moments and begun again: every attempt is there once."""
    url, rng = f"sqlite:///{tmp_path / 'killed.sqlite'}", random.Random(kills)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import autotune.tune"], cwd=ROOT, check=True)
    begun = time.monotonic() - start
    for _ in range(kills):
        killed(url, begun + rng.random() * 0.6)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, url], cwd=ROOT, capture_output=True, text=True, check=True
    )
    both = arms("fast", "slow")
    undisturbed = opened(f"sqlite:///{tmp_path / 'calm.sqlite'}")
    chosen = plan(attempts=60)
    expected = tune(both, both[1].choice(START), Recorded(bowl), undisturbed, 1, chosen)
    assert done.stdout.strip() == str(dict(expected.winner.config))
    found = [one.key for one in Store(url).attempts(1)]
    assert len(found) == len(set(found))
    assert set(found) == {one.key for one in undisturbed.attempts(1)}


# ------------------------------------------------------------------------------------------------
# a space of faults, in real processes


def test_the_right_winner_among_all_faults(store: Store) -> None:
    recipe = Recipe(spec=PRESETS["rq-2x256x8"], n=64, k=64, m=2, threads=1)
    name = "tests.autotune.faulty:KERNEL"
    space = enumerate_space(faulty.SPACE)
    one = Arm(name, "hash", space, Config(fault="none", delay_ms=40))
    budget = Budget(warmup_s=0.0, seconds=0.05, min_samples=5, max_samples=20)
    chosen = Plan(strategy="exhaustive", attempts=len(space), rounds=1, pairs=2)
    with Processes(recipe, budget=budget, limits=LIMITS) as processes:
        result = tune([one], one.choice(one.default), processes, store, 1, chosen)
    assert result.winner.config == Config(fault="none", delay_ms=10)
    found = {
        attempt.key.config["fault"]: attempt
        for attempt in store.attempts(1)
        if attempt.key.config["delay_ms"] == 10 and attempt.key.round == 0
    }
    statuses = {fault: attempt.measurement.status for fault, attempt in found.items()}
    assert statuses == {
        "none": "ok",
        "segfault": "runtime",
        "hang in compile": "timeout",
        "hang in launch": "timeout",
        "out of memory": "runtime",
        "wrong": "incorrect",
        "unwritten tail": "incorrect",
        "nan": "incorrect",
        "exception": "runtime",
        "nondeterministic": "incorrect",
        "exit": "runtime",
    }
    reasons = {fault: attempt.measurement.reason for fault, attempt in found.items()}
    assert reasons["segfault"] == "the process was ended by SIGSEGV"
    assert "Segmentation fault" in found["segfault"].log
    assert reasons["hang in compile"] == "compile: not done after 5 s"
    assert reasons["hang in launch"] == "check: not done after 5 s"
    assert "said by the kernel" in reasons["exception"]
    assert "other bits" in reasons["nondeterministic"]
    assert reasons["exit"] == "the process ended with exit code 0"
    assert "memory" in reasons["out of memory"]


def test_a_recipe_names_what_is_tuned() -> None:
    recipe = Recipe(spec=PRESETS["aqlm-2x8"], n=64, k=64, m=2, threads=1)
    device = recipe.where()
    facts = recipe.facts(device)
    assert facts["device"]["name"] == device.name
    assert (facts["n"], facts["m"], facts["spec"]["stages"]) == (64, 2, [256, 256])
    assert trial.find_kernel("torch/dense").id == "torch/dense"
    assert trial.find_kernel("tests.autotune.faulty:KERNEL") is faulty.KERNEL
