"""Is B slower or faster than A: the one place for statistics.

A comparison is one case in one call: pairs of medians, each pair from two fresh processes that ran
right after one another, in the order AB, BA, AB, ... so that drift of the machine falls on both
sides alike. Each pair gives one log-ratio; samples within a process are not independent and count
as one. B is slower than A only where all of these hold:

    the median ratio exceeds `ratio`, and `noise_factor` times the case's own A/A noise
    the median difference exceeds `seconds`, and the timer's floor
    the one-sided t bound of the mean log-ratio lies above `bound`, after Holm over all comparisons
    all pairs but `dissenters` agree in sign

and faster where they hold with A and B exchanged. Holm's step-down keeps the chance of any false
verdict in a call below `alpha` (S. Holm, "A simple sequentially rejective multiple test
procedure", 1979).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

__all__ = ["Comparison", "Judgement", "Rule", "Verdict", "holm", "judge", "t_quantile", "t_tail"]

Verdict = Literal["REGRESSED", "FASTER", "PASS", "INCONCLUSIVE"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """When a difference counts. ratio, bound: of times, above 1. seconds: absolute."""

    ratio: float = 1.03
    noise_factor: float = 2.0
    seconds: float = 0.5e-6
    bound: float = 1.01
    dissenters: int = 1
    alpha: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pairs of medians `(A, B)` in seconds of one case.

    noise: the ratio, above 1, by which A was seen to differ from A in this case. timer_s: the
    least difference that the timer can tell.
    """

    name: str
    pairs: tuple[tuple[float, float], ...]
    noise: float = 1.0
    timer_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.pairs) < 2 or any(a <= 0 or b <= 0 for a, b in self.pairs):
            raise ValueError(f"comparison {self.name}: needs two pairs of positive times or more")

    @property
    def logs(self) -> list[float]:
        """log(B / A) of each pair."""
        return [math.log(b / a) for a, b in self.pairs]

    def exchanged(self) -> Comparison:
        """B against A."""
        return dataclasses.replace(self, pairs=tuple((b, a) for a, b in self.pairs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """The verdict on a comparison and what it rests on.

    ratio: median of B / A. low, high: one-sided t bounds of the ratio's mean, at the level that
    Holm gave it (high: at alpha). smallest: the least slowdown that this comparison would have
    called, given its spread.
    """

    name: str
    verdict: Verdict
    ratio: float
    low: float
    high: float
    smallest: float
    reason: str


def judge(comparisons: Sequence[Comparison], rule: Rule | None = None) -> list[Judgement]:
    """A judgement for each comparison of a call; Holm goes over all of them."""
    rule = rule or Rule()
    slower = _levels([_tail(one, rule) for one in comparisons], rule.alpha)
    faster = _levels([_tail(one.exchanged(), rule) for one in comparisons], rule.alpha)
    return [
        _judgement(one, rule, up, down)
        for one, up, down in zip(comparisons, slower, faster, strict=True)
    ]


def _judgement(
    one: Comparison, rule: Rule, slower: tuple[bool, float], faster: tuple[bool, float]
) -> Judgement:
    logs, size = one.logs, len(one.pairs)
    mean, error = statistics.fmean(logs), _error(logs)
    ratio = math.exp(statistics.median(logs))
    least = _least(one, rule)
    high = math.exp(mean + t_quantile(1 - rule.alpha, size - 1) * error)
    reach = t_quantile(1 - slower[1], size - 1) * error
    against = _against(one, rule, slower[0])
    for_faster = _against(one.exchanged(), rule, faster[0])
    verdict: Verdict
    if not against:
        verdict, reason = "REGRESSED", f"slower by {ratio - 1:.1%}"
    elif not for_faster:
        verdict, reason = "FASTER", f"faster by {1 / ratio - 1:.1%}"
    elif high < least:
        verdict, reason = "PASS", f"not slower by {least - 1:.1%} or more"
    else:
        verdict, reason = "INCONCLUSIVE", against[0]
    return Judgement(
        name=one.name,
        verdict=verdict,
        ratio=ratio,
        low=math.exp(mean - reach),
        high=high,
        smallest=max(least, rule.bound * math.exp(reach)),
        reason=reason,
    )


def _least(one: Comparison, rule: Rule) -> float:
    """The ratio below which nothing counts."""
    return max(rule.ratio, 1 + rule.noise_factor * (one.noise - 1))


def _against(one: Comparison, rule: Rule, rejected: bool) -> list[str]:
    """What speaks against calling B slower; nothing does where all conditions hold."""
    logs, reasons = one.logs, []
    least = _least(one, rule)
    if math.exp(statistics.median(logs)) <= least:
        reasons.append(f"median ratio below {least:.3f}")
    difference = statistics.median(b - a for a, b in one.pairs)
    if difference <= max(rule.seconds, one.timer_s):
        reasons.append(f"median difference below {max(rule.seconds, one.timer_s) * 1e6:.3g} us")
    if not rejected:
        reasons.append(f"not above {rule.bound - 1:.1%} with certainty")
    if sum(log <= 0 for log in logs) > rule.dissenters:
        reasons.append("pairs disagree in sign")
    return reasons


def _error(logs: Sequence[float]) -> float:
    """Standard error of the mean; the least that a clock shows stands for pairs without spread."""
    return max(statistics.stdev(logs), 1e-9) / math.sqrt(len(logs))


def _tail(one: Comparison, rule: Rule) -> float:
    """p of: the mean ratio is no more than `bound`."""
    logs = one.logs
    statistic = (statistics.fmean(logs) - math.log(rule.bound)) / _error(logs)
    return t_tail(statistic, len(logs) - 1)


def _levels(tails: Sequence[float], alpha: float) -> list[tuple[bool, float]]:
    """For each test whether it is rejected, and the level it was held to."""
    return list(zip(*holm(tails, alpha), strict=True)) if tails else []


def holm(tails: Sequence[float], alpha: float) -> tuple[list[bool], list[float]]:
    """Which hypotheses fall, and the level each p was held to, by Holm's step-down procedure."""
    count = len(tails)
    order = sorted(range(count), key=lambda i: tails[i])
    rejected, levels, going = [False] * count, [alpha] * count, True
    for step, i in enumerate(order):
        levels[i] = alpha / (count - step)
        going = going and tails[i] <= levels[i]
        rejected[i] = going
    return rejected, levels


def t_tail(statistic: float, freedom: int) -> float:
    """Chance that Student's t with `freedom` degrees exceeds `statistic`.

    Exact for whole degrees: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(statistic), math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom == 1:
        inside = 2 * angle / math.pi
    else:
        odd = freedom % 2
        term = total = cosine if odd else 1.0
        for j in range(1, (freedom - 2 - odd) // 2 + 1):
            term *= (2 * j if odd else 2 * j - 1) / (2 * j + 1 if odd else 2 * j) * cosine**2
            total += term
        inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    tail = (1 - inside) / 2
    return tail if statistic >= 0 else 1 - tail


def t_quantile(level: float, freedom: int) -> float:
    """The value that Student's t stays below with probability `level`, by bisection."""
    if level < 0.5:
        return -t_quantile(1 - level, freedom)
    low, high = 0.0, 1.0
    while 1 - t_tail(high, freedom) < level:
        low, high = high, 2 * high
        if high > 1e12:
            return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - t_tail(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high
