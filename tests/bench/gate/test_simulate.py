"""How often the gate is wrong, through its own code: a few trials here, 20,000 in the sweep."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest

from autotune.verdict import Rule, detectable
from bench.gate import simulate as simulation
from bench.gate.simulate import EFFECTS, SPREADS, Setting, Tally, rows, simulate

# Power at +5 % that is asked of the gate at each spread.
POWERS = dict(zip(SPREADS, (0.95, 0.90, 0.55), strict=True))

# One condition at a time: others are open, so that only it stands between noise and a verdict.
OPEN = Rule(ratio=1 + 1e-9, seconds=0.0, bound=1 + 1e-9, dissenters=14, alpha=0.5)


def slower(setting: Setting, trials: int, rule: Rule | None = None) -> float:
    return simulate(setting, trials, rule=rule).shares["regressed"]


def test_the_same_seed_gives_the_same_counts() -> None:
    setting = Setting(between=0.03, effect=0.04, cases=2)
    assert simulate(setting, 50, 3) == simulate(setting, 50, 3)
    assert simulate(setting, 50, 3).slowed != simulate(setting, 50, 4).slowed


def test_every_case_gets_a_verdict() -> None:
    tally = simulate(Setting(effect=0.1, cases=3, slowed=2, slow_share=0.1), 20)
    assert tally.slowed == {"REGRESSED": 40}
    assert sum(tally.others.values()) == 20
    assert "REGRESSED" not in tally.others
    assert tally.repeated == 20


def test_power_and_false_verdicts() -> None:
    for between, power in POWERS.items():
        assert slower(Setting(between=between, effect=0.05), 200) > power
        assert slower(Setting(between=between, effect=0.08), 200) > 0.95
        assert slower(Setting(between=between), 200) == 0


def test_what_noise_shows_once_it_rarely_shows_again() -> None:
    tally = simulate(Setting(between=0.05), 1000)
    assert 10 < tally.repeated < 100
    assert tally.slowed.get("REGRESSED", 0) <= 3


def test_holm_keeps_many_cases_from_failing_by_chance() -> None:
    # the bound alone, each case just on it
    bound = dataclasses.replace(OPEN, bound=1.01, alpha=0.05)
    setting = Setting(effect=0.01, between=0.02, cases=10, slowed=10, drift=0.0)
    shares = simulate(setting, 300, rule=bound).shares
    assert shares["regressed"] < 0.005
    assert shares["faster"] < 0.005
    alone = dataclasses.replace(setting, cases=1, slowed=1)
    assert slower(alone, 1000, bound) > 0.01, "what each would cost without Holm"


def test_signs_keep_noise_from_failing() -> None:
    signs = dataclasses.replace(OPEN, dissenters=1)
    setting = Setting(between=0.02)
    assert slower(setting, 300, signs) < 0.03
    assert slower(setting, 300, OPEN) > 0.2


def test_drift_falls_on_both_sides_alike() -> None:
    still = Setting(between=1e-4, within=1e-4, drift=0.0)
    drifting = dataclasses.replace(still, drift=0.2)
    assert simulate(still, 100).slowed == {"PASS": 100}
    assert "REGRESSED" not in simulate(drifting, 200).slowed
    # drift reaches the samples: it is what leaves some of them open
    assert simulate(drifting, 200).slowed.get("INCONCLUSIVE", 0) > 20


def test_sessions_are_what_the_setting_says() -> None:
    setting = Setting(effect=0.05, between=0.02, within=0.2, drift=0.0, cases=4, slowed=2)
    times = simulation._session(setting, 500, np.random.default_rng(0))
    assert times.shape == (500, 4, 7, 2)
    logs = np.log(times / setting.time_s)
    # a median of 100 spreads as its samples do, by sqrt(pi / 2 / 100)
    spread = math.hypot(0.02, 0.2 * math.sqrt(math.pi / 200))
    assert logs[..., 0].std() == pytest.approx(spread, rel=0.03)
    ratios = (logs[..., 1] - logs[..., 0]).mean(axis=(0, 2))
    assert np.exp(ratios) == pytest.approx([1.05, 1.05, 1, 1], abs=0.003)


def test_the_drift_is_a_line_a_step_or_a_sine() -> None:
    drift = simulation._drift(0.03, 300, 14, np.random.default_rng(0))
    assert np.abs(drift).max() == pytest.approx(0.03)
    distinct = np.array([len(set(np.round(line, 9))) for line in drift])
    assert (distinct <= 2).mean() == pytest.approx(1 / 3, abs=0.1), "steps"
    straight = np.abs(np.diff(drift, 2)).max(axis=1) < 1e-9
    assert (straight & (distinct > 2)).mean() == pytest.approx(1 / 3, abs=0.1), "lines"
    assert (drift.mean(axis=1) > 0).mean() == pytest.approx(0.5, abs=0.1), "up and down"


@pytest.mark.parametrize("between", SPREADS)
def test_what_is_called_detectable_is_found(between: float) -> None:
    spread = math.sqrt(2) * math.hypot(between, 0.01 * math.sqrt(math.pi / 200))
    effect = detectable(spread, 7, time_s=1e-4) - 1
    assert 0.65 < slower(Setting(between=between, effect=effect, drift=0.0), 200) < 0.95


def test_a_row_for_each_spread_and_effect() -> None:
    told: list[Setting] = []
    found = list(rows(10, progress=told.append))
    assert [(row["between"], row["effect"]) for row in found] == [
        (between, effect) for between in SPREADS for effect in EFFECTS
    ]
    assert [(one.between, one.effect) for one in told] == [
        (row["between"], row["effect"]) for row in found
    ]
    for row in found:
        verdicts = ("regressed", "faster", "pass", "inconclusive")
        assert sum(row[name] for name in verdicts) == pytest.approx(1)
        assert all(row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] for name in verdicts)
    assert found[3]["regressed"] == 1 and found[3]["repeated"] == 1


# ------------------------------------------------------------------------------------------------
# what is promised of the gate, with 20,000 trials

TRIALS = 20_000


def tally(**fields) -> Tally:
    return simulate(Setting(**fields), TRIALS)


@pytest.mark.sweep
@pytest.mark.parametrize("between", SPREADS)
def test_false_regressions_are_at_most_one_in_a_thousand(between: float) -> None:
    assert tally(between=between).shares["regressed_high"] <= 0.001


@pytest.mark.sweep
def test_so_they_are_where_some_processes_are_slow() -> None:
    assert tally(between=0.02, slow_share=0.1).shares["regressed_high"] <= 0.001


@pytest.mark.sweep
@pytest.mark.parametrize("between", SPREADS)
def test_eight_percent_are_found(between: float) -> None:
    assert tally(between=between, effect=0.08).shares["regressed_low"] >= 0.95


@pytest.mark.sweep
@pytest.mark.parametrize("between", SPREADS)
def test_five_percent_are_found(between: float) -> None:
    assert tally(between=between, effect=0.05).shares["regressed_low"] >= POWERS[between]


@pytest.mark.sweep
def test_many_cases_cost_little_power() -> None:
    several = [
        simulate(Setting(between=0.02, effect=0.05, cases=cases), 1000) for cases in (1, 5, 20)
    ]
    powers = [one.shares["regressed"] for one in several]
    assert all(more - less < 0.05 for more, less in pairwise(powers))
    assert min(powers) > 0.75
    assert sum(one.others.get("REGRESSED", 0) for one in several) <= 0.001 * 1000 * (4 + 19)
