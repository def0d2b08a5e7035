"""How sure a median, a ratio of medians or a mean of ratios is: intervals of 95 %.

None of them decides whether something got slower: samples within a process aren't independent, so
an interval is of its run alone. `autotune.verdict` decides, from pairs of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

from autotune.verdict import t_quantile

__all__ = ["LEVEL", "Estimate", "GeometricMean", "geometric_mean", "median", "quotient"]

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its interval, None where too little was measured for one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class GeometricMean:
    """Of ratios, with the geometric standard deviation (a factor), None of a single ratio."""

    mean: Estimate
    deviation: float | None


def median(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Median and its interval by order statistics: of any distribution, for independent values.

    The d-th value from either end, d as large as P(Binomial(n, 1/2) < d) <= (1 - level) / 2
    allows: fewer than 6 values have no interval of 95 % (David and Nagaraja,
    "Order Statistics", 2003, section 7.1).
    """
    ordered = sorted(values)
    middle, depth = statistics.median(ordered), _depth(len(ordered), level)
    if depth == 0:
        return Estimate(middle)
    return Estimate(middle, ordered[depth - 1], ordered[-depth])


@functools.cache
def _depth(size: int, level: float) -> int:
    """How far from either end of `size` ordered values the interval's bounds stand; 0: nowhere."""
    allowed = (1 - Fraction(level)) / 2 * 2**size  # exact: 2**1024 is no float
    depth, ways, below = 0, 1, 1  # ways: of `depth` values below the median
    while below <= allowed:
        ways = ways * (size - depth) // (depth + 1)
        depth += 1
        below += ways
    return depth


def quotient(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """Ratio of two medians that were measured independently.

    Each median's interval has the root of the level, so that the quotients of their bounds hold
    the ratio with the level at least.
    """
    above, below = (median(values, math.sqrt(LEVEL)) for values in (over, under))
    value = above.value / below.value
    if above.low is None or above.high is None or not below.low or below.high is None:
        return Estimate(value)  # also where a clock's coarse 0 would make a bound infinite
    return Estimate(value, above.low / below.high, above.high / below.low)


def geometric_mean(ratios: Sequence[float]) -> GeometricMean:
    """Geometric mean and its t interval on logarithms, as if the ratios were drawn at random."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return GeometricMean(Estimate(math.exp(middle)), None)
    deviation = statistics.stdev(logs)
    reach = t_quantile((1 + LEVEL) / 2, len(logs) - 1) * deviation / math.sqrt(len(logs))
    mean = Estimate(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))
    return GeometricMean(mean, math.exp(deviation))
