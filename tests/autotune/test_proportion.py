from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from autotune.proportion import interval


@given(st.integers(0, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_exact(counted: tuple[int, int]) -> None:
    successes, trials = counted
    low, high = interval(successes, trials)
    beta = stats.beta.ppf
    assert low == pytest.approx(
        beta(0.025, successes, trials - successes + 1) if successes else 0, abs=1e-9
    )
    assert high == pytest.approx(
        beta(0.975, successes + 1, trials - successes) if successes < trials else 1, abs=1e-9
    )


def test_none_of_many_is_not_none() -> None:
    # the rule of three, for two sides: -ln 0.025 / n
    assert interval(0, 20_000) == (0, pytest.approx(3.689 / 20_000, rel=1e-3))
    assert interval(20_000, 20_000)[0] == pytest.approx(1 - 3.689 / 20_000, rel=1e-9, abs=1e-7)
    assert interval(0, 0) == (0, 1)


def test_a_higher_level_is_wider() -> None:
    (low, high), (lower, higher) = interval(5, 50), interval(5, 50, 0.99)
    assert lower < low < 0.1 < high < higher


@pytest.mark.parametrize("counted", [(-1, 5), (6, 5), (1, 5, 1.0), (1, 5, 0.0)])
def test_what_is_no_share(counted) -> None:
    with pytest.raises(ValueError, match="no share"):
        interval(*counted)
