"""The rule for slower and faster: parts against scipy, conditions one by one, error rates."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from autotune.verdict import (
    Comparison,
    Judgement,
    Rule,
    detectable,
    holm,
    judge,
    settle,
    suspects,
    t_quantile,
    t_tail,
)

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
    assert rejected == [p <= level for p, level in zip(tails, levels, strict=True)]


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


@given(
    st.lists(st.floats(0.9, 1.2), min_size=7, max_size=7, unique=True),
    st.floats(1e-6, 1e-4),
    st.integers(1, 20),
)
def test_the_smallest_effect_is_what_would_have_been_seen(
    spread: list[float], time_s: float, cases: int
) -> None:
    """By whichever condition comes last: size, difference, bound or signs."""

    def seen(by: float) -> Judgement:
        one = Comparison(name="x", pairs=tuple((time_s, time_s * f * by) for f in spread))
        return judge([one, *[compared(1.0)] * (cases - 1)])[0]

    found = seen(1.0)
    needed = found.smallest / found.ratio
    assert seen(needed * 1.0001).verdict == "REGRESSED"
    assert seen(needed * 0.9999).verdict != "REGRESSED"


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


# ------------------------------------------------------------------------------------------------
# measured again

NOISY = (0.97, 1.03, 0.98, 1.02, 0.95, 1.05, 1.0)


def named(name: str, effect: float, spread: tuple[float, ...] = STEADY, **fields) -> Comparison:
    return dataclasses.replace(compared(effect, spread, **fields), name=name)


def test_a_suspect_is_what_the_rule_calls_slower_by_itself() -> None:
    quiet = [named(f"quiet {number}", 1.0) for number in range(19)]
    borderline = named("borderline", 1.05, NOISY)
    assert judge([borderline, *quiet])[0].verdict == "INCONCLUSIVE", "Holm, over 20 cases"
    assert suspects([borderline, *quiet]) == [borderline]
    assert suspects([named("faster", 0.9), named("below", 1.02)]) == []
    assert suspects([named("noisy", 1.06, noise=1.04)]) == []


def test_twice_the_pairs_pay_for_holm() -> None:
    quiet = [named(f"quiet {number}", 1.0) for number in range(19)]
    borderline = named("borderline", 1.05, NOISY)
    found = {one.name: one for one in settle([*quiet, borderline], [borderline])}
    assert found["borderline"].verdict == "REGRESSED"
    assert found["borderline"].low > 1.01
    assert found["borderline"].reason == "slower by 5.0%: 1.050x at first, 1.050x again"
    assert {one.verdict for name, one in found.items() if name != "borderline"} == {"PASS"}


def test_holm_goes_over_cases_that_were_no_suspects() -> None:
    one = named("one", 1.055, (0.93, 1.07, 0.95, 1.05, 0.96, 1.04, 1.0))
    assert settle([one], [one])[0].verdict == "REGRESSED"
    among = settle([one, *[named(str(n), 1.0) for n in range(100)]], [one])[0]
    assert (among.verdict, among.reason) == (
        "INCONCLUSIVE",
        "1.055x at first, 1.055x again: not above 1.0% with certainty",
    )


@pytest.mark.parametrize(
    ("again", "spread", "verdict", "reason"),
    [
        (1.06, STEADY, "REGRESSED", "slower by 6.0%: 1.060x at first, 1.060x again"),
        (1.01, STEADY, "PASS", "1.060x at first, 1.010x again: not slower by 3.0% or more"),
        (1.02, NOISY, "INCONCLUSIVE", "1.060x at first, 1.020x again: median ratio below 1.030"),
        (0.90, STEADY, "PASS", "1.060x at first, 0.900x again: not slower by 3.0% or more"),
        # all pairs would do: the fresh ones alone have to show it too
        (1.029, STEADY, "PASS", "1.060x at first, 1.029x again: not slower by 3.0% or more"),
        # large enough again, but three of all pairs dissent
        (
            1.06,
            (0.9, 0.93, 0.93, 1.0, 1.0, 1.0, 1.0),
            "INCONCLUSIVE",
            "1.060x at first, 1.060x again: pairs disagree in sign",
        ),
    ],
)
def test_only_what_is_reproduced_is_slower(again, spread, verdict, reason) -> None:
    (found,) = settle([compared(1.06)], [compared(again, spread)])
    assert (found.verdict, found.reason) == (verdict, reason)


def test_a_difference_has_to_be_seen_again() -> None:
    first = Comparison(name="x", pairs=((1e-5, 1.08e-5),) * 7)
    fresh = Comparison(name="x", pairs=((1e-5, 1.045e-5),) * 7)
    (found,) = settle([first], [fresh])
    assert (found.verdict, found.reason) == (
        "INCONCLUSIVE",
        "1.080x at first, 1.045x again: median difference below 0.5 us",
    )


def test_without_fresh_pairs_nothing_is_slower() -> None:
    (found,) = settle([compared(1.06)], [])
    assert found.verdict == "INCONCLUSIVE"
    assert found.reason == "slower by 6.0% at first, not measured again"


def test_what_is_no_suspect_is_judged_as_before() -> None:
    first = [named("same", 1.0), named("faster", 0.9), named("unsure", 1.03, NOISY)]
    settled = settle(first, [])
    assert [one.verdict for one in settled] == [one.verdict for one in judge(first)]
    assert [one.verdict for one in settled] == ["PASS", "FASTER", "INCONCLUSIVE"]
    # to be found in two rounds it has to be larger than for one
    alone = [judge([one])[0].smallest for one in first]
    assert all(one.smallest > once for one, once in zip(settled, alone, strict=True))


@pytest.mark.parametrize(
    ("first", "fresh"), [(["a", "a"], []), (["a"], ["a", "a"]), (["a"], ["b"])]
)
def test_names_tell_cases_apart(first, fresh) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        settle([named(name, 1.06) for name in first], [named(name, 1.06) for name in fresh])
    assert settle([], []) == []


def test_dissenters_go_with_the_number_of_pairs() -> None:
    def dissenting(pairs: int, against: int) -> str:
        spread = (*(1.10,) * (pairs - against), *(0.99,) * against)
        return verdict(compared(1.0, spread), Rule(bound=1.0, alpha=0.4))

    assert [dissenting(14, 2), dissenting(14, 3)] == ["REGRESSED", "INCONCLUSIVE"]
    assert [dissenting(5, 1), dissenting(5, 2)] == ["REGRESSED", "INCONCLUSIVE"]
    assert [dissenting(3, 0), dissenting(3, 1)] == ["REGRESSED", "INCONCLUSIVE"]


def test_what_is_detectable() -> None:
    assert detectable(0.0, 7) == pytest.approx(1.03)
    assert detectable(0.0, 7, noise=1.04) == pytest.approx(1.08)
    assert detectable(0.0, 7, time_s=1e-5) == pytest.approx(1.05)
    assert detectable(0.0, 7, Rule(ratio=1.1)) == pytest.approx(1.1)
    spreads = [detectable(spread, 7) for spread in (0.005, 0.01, 0.02, 0.05, 0.1)]
    assert spreads == sorted(set(spreads)), "more noise hides more"
    pairs = [detectable(0.1, pairs) for pairs in (3, 5, 7, 14, 28)]
    assert pairs == sorted(set(pairs), reverse=True), "more pairs show more"
    assert detectable(0.1, 7, cases=1000) > detectable(0.1, 7)
