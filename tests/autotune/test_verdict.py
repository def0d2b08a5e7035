"""The rule for slower and faster: parts against scipy, conditions one by one, error rates."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from autotune.verdict import Comparison, Rule, holm, judge, t_quantile, t_tail

STEADY = (1.0, 1.001, 0.999, 1.0005, 0.9995, 1.0, 1.0002)


def compared(effect: float, spread: tuple[float, ...] = STEADY, **fields) -> Comparison:
    """Seven pairs around 100 us whose B takes `effect` times as long."""
    pairs = tuple((1e-4, 1e-4 * effect * factor) for factor in spread)
    return Comparison(name="case", pairs=pairs, **fields)


def verdict(one: Comparison, rule: Rule | None = None) -> str:
    (judgement,) = judge([one], rule)
    return judgement.verdict


@given(st.integers(1, 60), st.floats(-50, 50))
def test_t_is_students(freedom: int, statistic: float) -> None:
    assert t_tail(statistic, freedom) == pytest.approx(stats.t.sf(statistic, freedom), abs=1e-13)


@given(st.integers(1, 60), st.floats(0.001, 0.999))
def test_quantiles_are_students(freedom: int, level: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf(level, freedom), abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_rejects_what_adjusted_p_values_do(tails: list[float]) -> None:
    rejected, levels = holm(tails, 0.05)
    order = sorted(range(len(tails)), key=lambda i: tails[i])
    adjusted, highest = [0.0] * len(tails), 0.0
    for step, i in enumerate(order):
        highest = max(highest, (len(tails) - step) * tails[i])
        adjusted[i] = highest
    # at the edge itself the two ways of rounding may part
    for fell, p in zip(rejected, adjusted, strict=True):
        assert fell == (p <= 0.05) or math.isclose(p, 0.05, rel_tol=1e-12)
    assert min(levels) == pytest.approx(0.05 / len(tails))


def test_clear_cases() -> None:
    assert verdict(compared(1.05)) == "REGRESSED"
    assert verdict(compared(1 / 1.05)) == "FASTER"
    assert verdict(compared(1.0)) == "PASS"
    assert verdict(compared(1.02)) == "PASS", "below the least ratio"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"noise": 1.04}, "median ratio below 1.080"),
        ({"timer_s": 1e-5}, "median difference below 10 us"),
    ],
)
def test_noise_and_timer_raise_the_bar(change, reason) -> None:
    (judgement,) = judge([compared(1.06, **change)])
    assert judgement.verdict in ("PASS", "INCONCLUSIVE")
    assert verdict(compared(1.06)) == "REGRESSED"
    wide = dataclasses.replace(compared(1.06, (0.8, 1.2, 0.9, 1.1, 1.0, 1.0, 1.0)), **change)
    (judgement,) = judge([wide])
    assert (judgement.verdict, judgement.reason) == ("INCONCLUSIVE", reason)


def test_a_difference_below_half_a_microsecond_is_none() -> None:
    tiny = Comparison(name="tiny", pairs=((4e-6, 4.4e-6),) * 7)
    assert verdict(tiny) == "INCONCLUSIVE"
    assert verdict(tiny, Rule(seconds=0.3e-6)) == "REGRESSED"


def test_signs_have_to_agree() -> None:
    one_against = (*(1.10,) * 6, 0.99)
    two_against = (*(1.10,) * 5, 0.99, 0.99)
    loose = Rule(bound=1.0, alpha=0.4)
    assert verdict(compared(1.0, one_against), loose) == "REGRESSED"
    assert verdict(compared(1.0, two_against), loose) == "INCONCLUSIVE"


def test_holm_goes_over_all_comparisons() -> None:
    borderline = compared(1.045, (0.98, 1.02, 0.99, 1.01, 0.97, 1.03, 1.02))
    quiet = [compared(1.0) for _ in range(200)]
    assert verdict(borderline) == "REGRESSED"
    assert judge([borderline, *quiet])[0].verdict == "INCONCLUSIVE"


def test_the_smallest_effect_would_have_been_seen() -> None:
    spread = (0.96, 1.04, 0.98, 1.02, 0.94, 1.06, 1.0)
    (judgement,) = judge([compared(1.0, spread)], Rule(dissenters=3))
    assert judgement.smallest > 1.03
    seen, unseen = (compared(judgement.smallest * by, spread) for by in (1.005, 0.99))
    assert verdict(seen, Rule(dissenters=3)) == "REGRESSED"
    assert verdict(unseen, Rule(dissenters=3)) != "REGRESSED"


def test_pairs_without_spread() -> None:
    same = Comparison(name="same", pairs=((1e-4, 1e-4),) * 7)
    assert verdict(same) == "PASS"


@pytest.mark.parametrize("pairs", [(), ((1.0, 1.0),), ((1.0, 0.0), (1.0, 1.0))])
def test_what_is_no_comparison(pairs) -> None:
    with pytest.raises(ValueError, match="needs two pairs of positive times"):
        Comparison(name="x", pairs=pairs)


def simulated(effect: float, between: float, cases: int, rounds: int, wanted: str) -> float:
    """Share of comparisons that got the verdict, with normal log-noise between processes."""
    rng, found = random.Random(7), 0

    def median(factor: float) -> float:
        return 1e-4 * factor * math.exp(rng.gauss(0, between))

    for _ in range(rounds):
        several = [
            Comparison(name="x", pairs=tuple((median(1), median(effect)) for _ in range(7)))
            for _ in range(cases)
        ]
        found += sum(one.verdict == wanted for one in judge(several))
    return found / (cases * rounds)


def test_error_rates() -> None:
    for between in (0.003, 0.01, 0.02):
        assert simulated(1.0, between, 10, 40, "REGRESSED") <= 0.005
        assert simulated(1.0, between, 10, 40, "FASTER") <= 0.005
    assert simulated(1.05, 0.01, 1, 200, "REGRESSED") >= 0.97
    assert simulated(1.08, 0.02, 1, 200, "REGRESSED") >= 0.97
