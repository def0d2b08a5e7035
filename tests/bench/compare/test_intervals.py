"""Intervals: scipy's own as the oracle, and how often they hold what they should."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from bench.compare.intervals import LEVEL, Estimate, geometric_mean, median, quotient


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 8, 9, 20, 21, 100, 200, 2000])
@pytest.mark.parametrize("level", [0.9, LEVEL, math.sqrt(LEVEL)])
def test_a_median_has_the_interval_that_scipy_gives(size: int, level: float) -> None:
    source = random.Random(size)
    values = [source.lognormvariate(0, 1) for _ in range(size)]
    found = median(values, level)
    theirs = stats.quantile_test(values, p=0.5).confidence_interval(level)
    if found.low is None:
        assert math.isnan(theirs.low) and math.isnan(theirs.high)
        assert found.high is None
        assert 2 * stats.binom.cdf(0, size, 0.5) > 1 - level
    else:
        assert (found.low, found.high) == (theirs.low, theirs.high)
        assert found.low <= found.value <= found.high


def test_of_few_values_the_interval_is_the_range_or_none() -> None:
    assert median([5.0, 1.0, 4.0, 2.0, 3.0]) == Estimate(3.0)
    assert median([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Estimate(3.5, 1.0, 6.0)
    assert median([2.0] * 9) == Estimate(2.0, 2.0, 2.0)


def test_a_ratio_rests_on_the_intervals_of_both_medians() -> None:
    source = random.Random(0)
    over, under = ([source.lognormvariate(mu, 0.5) for _ in range(60)] for mu in (0.3, 0.0))
    above, below = (
        stats.quantile_test(values, p=0.5).confidence_interval(math.sqrt(LEVEL))
        for values in (over, under)
    )
    found = quotient(over, under)
    assert found.value == statistics.median(over) / statistics.median(under)
    assert (found.low, found.high) == (above.low / below.high, above.high / below.low)


def test_a_ratio_has_no_interval_where_a_side_has_none() -> None:
    assert quotient([2.0] * 9, [1.0] * 3) == Estimate(2.0)
    assert quotient([2.0] * 3, [1.0] * 9) == Estimate(2.0)
    # six values have an interval of 95 %, but none of its root
    assert quotient([2.0] * 6, [1.0] * 9) == Estimate(2.0)
    assert quotient([2.0] * 7, [1.0] * 7) == Estimate(2.0, 2.0, 2.0)
    # a clock too coarse for the fastest samples
    assert quotient([2.0] * 7, [0.0, *[1.0] * 6]) == Estimate(2.0)


@pytest.mark.parametrize("size", [2, 3, 10, 301])
def test_a_geometric_mean_is_scipys(size: int) -> None:
    source = random.Random(size)
    ratios = [source.lognormvariate(0.1, 0.3) for _ in range(size)]
    found = geometric_mean(ratios)
    logs = [math.log(ratio) for ratio in ratios]
    low, high = stats.t.interval(LEVEL, size - 1, stats.tmean(logs), stats.sem(logs))
    assert found.mean.value == pytest.approx(stats.gmean(ratios), rel=1e-12)
    assert found.mean.low == pytest.approx(math.exp(low), rel=1e-9)
    assert found.mean.high == pytest.approx(math.exp(high), rel=1e-9)
    assert found.deviation == pytest.approx(stats.gstd(ratios), rel=1e-12)


def test_a_single_ratio_has_no_spread() -> None:
    found = geometric_mean([1.25])
    assert found.mean == Estimate(pytest.approx(1.25))
    assert found.deviation is None
