"""Is B slower or faster than A: the one place for statistics.

A comparison is one case in one call: pairs of medians, each pair from two fresh processes that ran
right after one another or in turns, in the order AB, BA, AB, ... so that drift of the machine falls
on both sides alike. Each pair gives one log-ratio; samples within a process are not independent and
count as one. B is slower than A only where all of these hold:

    the median ratio exceeds `ratio`, and `noise_factor` times the case's own A/A noise
    the median difference exceeds `seconds`, and the timer's floor
    the one-sided t bound of the mean log-ratio lies above `bound`, after Holm over all comparisons
    all pairs but `dissenters` agree in sign

and faster where they hold with A and B exchanged. Holm's step-down keeps the chance of any false
verdict in a call below `alpha` (S. Holm, "A simple sequentially rejective multiple test
procedure", 1979).

A gate measures twice before it fails. What meets the conditions on its own, without Holm, is a
suspect and measured again (`suspects`). It is slower only if the fresh pairs alone show a slowdown
that counts, and all pairs together meet every condition, with Holm over all cases of the call
(`settle`). Who was no suspect counts in Holm as the largest p, 1, so the chance of a false verdict
stays below `alpha`; and twice the pairs pay for Holm: at 20 cases a slowdown is found nearly as
often as at one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Literal

__all__ = [
    "Comparison",
    "Judgement",
    "Rule",
    "Verdict",
    "detectable",
    "holm",
    "judge",
    "settle",
    "suspects",
    "t_quantile",
    "t_tail",
]

# How often a slowdown that is called detectable is to be found.
_FOUND = 0.8
# Standard errors beyond what a round sees every second time, for two rounds to see it so often:
# a normal number is below 0.545 with probability 0.5 ** 0.5, a median spreads 1.25 times a mean.
_TWICE = 0.545 * 1.25

Verdict = Literal["REGRESSED", "FASTER", "PASS", "INCONCLUSIVE"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """When a difference counts.

    ratio, bound: of times, above 1. seconds: absolute. dissenters: of seven pairs, and in
    proportion of more or fewer.
    """

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
    least difference that the timer can tell. ratio, seconds: what counts in this case, where that
    isn't the rule's.
    """

    name: str
    pairs: tuple[tuple[float, float], ...]
    noise: float = 1.0
    timer_s: float = 0.0
    ratio: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if len(self.pairs) < 2 or any(a <= 0 or b <= 0 for a, b in self.pairs):
            raise ValueError(f"comparison {self.name}: needs two pairs of positive times or more")

    @functools.cached_property
    def logs(self) -> list[float]:
        """log(B / A) of each pair."""
        return [math.log(b / a) for a, b in self.pairs]

    @functools.cached_property
    def error(self) -> float:
        """Standard error of the mean log; pairs without spread have the least a clock shows."""
        return max(statistics.stdev(self.logs), 1e-9) / math.sqrt(len(self.pairs))

    def exchanged(self) -> Comparison:
        """B against A."""
        return dataclasses.replace(self, pairs=tuple((b, a) for a, b in self.pairs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """The verdict on a comparison and what it rests on.

    ratio: median of B / A. low, high: one-sided t bounds of the ratio's mean, at the level that
    Holm gave it (high: at alpha). smallest: the slowdown that is found about every second time:
    the median ratio above which these pairs would have been called slower, had all of B been slower
    by one factor. Of `settle` it includes what it takes to be found twice.
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


def suspects(comparisons: Sequence[Comparison], rule: Rule | None = None) -> list[Comparison]:
    """What has to be measured again: what would be slower if it were the call's only case."""
    rule = rule or Rule()
    return [one for one in comparisons if _suspect(one, rule)]


def settle(
    first: Sequence[Comparison], fresh: Sequence[Comparison], rule: Rule | None = None
) -> list[Judgement]:
    """A judgement for each of `first`, now that its suspects were measured again.

    fresh: new pairs of the suspects, by name; a suspect without any stays inconclusive. What they
    don't reproduce is judged by them alone, since the first pairs were chosen for being slow.
    Raises ValueError where names don't tell cases apart, or one of `fresh` isn't in `first`.
    """
    rule = rule or Rule()
    again = {one.name: one for one in fresh}
    names = {one.name for one in first}
    if len(names) < len(first) or len(again) < len(fresh) or not names >= set(again):
        raise ValueError("comparisons: each needs a name of its own, the same at both times")
    pooled = [_pooled(one, again[one.name]) if one.name in again else None for one in first]
    tails = [1.0 if all_pairs is None else _tail(all_pairs, rule) for all_pairs in pooled]
    settled = []
    for one, judgement, level in zip(
        first, judge(first, rule), _levels(tails, rule.alpha), strict=True
    ):
        if not _suspect(one, rule):
            smallest = _smallest(one, rule, rule.alpha) * math.exp(_TWICE * one.error)
            settled.append(dataclasses.replace(judgement, smallest=smallest))
        elif one.name not in again:
            reason = f"slower by {judgement.ratio - 1:.1%} at first, not measured again"
            settled.append(dataclasses.replace(judgement, verdict="INCONCLUSIVE", reason=reason))
        else:
            settled.append(_confirmed(one, again[one.name], rule, level))
    return settled


def _confirmed(
    first: Comparison, fresh: Comparison, rule: Rule, slower: tuple[bool, float]
) -> Judgement:
    """The judgement on a suspect. slower: what Holm says of all its pairs."""
    pooled, none = _pooled(first, fresh), (False, rule.alpha)
    story = f"{_ratio(first):.3f}x at first, {_ratio(fresh):.3f}x again"
    both = _judgement(pooled, rule, slower, none)
    if both.verdict == "REGRESSED" and not _too_small(fresh, rule):
        return dataclasses.replace(both, reason=f"{both.reason}: {story}")
    alone = _judgement(fresh, rule, (False, slower[1]), none)
    against = _too_small(fresh, rule) or _against(pooled, rule, slower[0])
    reason = alone.reason if alone.verdict == "PASS" else against[0]
    return dataclasses.replace(alone, reason=f"{story}: {reason}")


def _pooled(first: Comparison, fresh: Comparison) -> Comparison:
    return dataclasses.replace(first, pairs=first.pairs + fresh.pairs)


def _suspect(one: Comparison, rule: Rule) -> bool:
    return not _against(one, rule, _tail(one, rule) <= rule.alpha)


def _judgement(
    one: Comparison, rule: Rule, slower: tuple[bool, float], faster: tuple[bool, float]
) -> Judgement:
    mean, freedom = statistics.fmean(one.logs), len(one.pairs) - 1
    ratio, least = _ratio(one), _least(one, rule)
    high = math.exp(mean + t_quantile(1 - rule.alpha, freedom) * one.error)
    against = _against(one, rule, slower[0])
    verdict: Verdict
    if not against:
        verdict, reason = "REGRESSED", f"slower by {ratio - 1:.1%}"
    elif not _against(one.exchanged(), rule, faster[0]):
        verdict, reason = "FASTER", f"faster by {1 / ratio - 1:.1%}"
    elif high < least:
        verdict, reason = "PASS", f"not slower by {least - 1:.1%} or more"
    else:
        verdict, reason = "INCONCLUSIVE", against[0]
    return Judgement(
        name=one.name,
        verdict=verdict,
        ratio=ratio,
        low=math.exp(mean - t_quantile(1 - slower[1], freedom) * one.error),
        high=high,
        smallest=_smallest(one, rule, slower[1]),
        reason=reason,
    )


def _smallest(one: Comparison, rule: Rule, level: float) -> float:
    """See Judgement: each condition, solved for the log that all pairs lack."""
    logs, median = one.logs, statistics.median(one.logs)
    reach = t_quantile(1 - level, len(logs) - 1) * one.error
    floor, dissenters = _floor(one, rule), _dissenters(len(logs), rule)
    lacking = max(
        math.log(_least(one, rule)) - median,
        statistics.median(math.log((a + floor) / b) for a, b in one.pairs),
        math.log(rule.bound) + reach - statistics.fmean(logs),
        *(-log for log in sorted(logs)[dissenters : dissenters + 1]),
    )
    return math.exp(median + lacking)


def _dissenters(pairs: int, rule: Rule) -> int:
    return round(rule.dissenters * pairs / 7)


def _ratio(one: Comparison) -> float:
    return math.exp(statistics.median(one.logs))


def detectable(
    spread: float,
    pairs: int,
    rule: Rule | None = None,
    cases: int = 1,
    noise: float = 1.0,
    time_s: float = math.inf,
) -> float:
    """The slowdown, as a ratio, that a gate of suspects and `settle` finds in about 4 of 5 calls.

    spread: standard deviation of a pair's log-ratio. cases: of the call. noise: see Comparison.
    time_s: what A takes; without it the absolute difference is left out. Each condition is solved
    for normal logs as if it were the only one, for a chance whose square is 4 / 5.
    """
    rule, normal = rule or Rule(), statistics.NormalDist()
    once = normal.inv_cdf(_FOUND**0.5)
    least = max(rule.ratio, 1 + rule.noise_factor * (noise - 1), 1 + rule.seconds / time_s)
    # the median of few normal numbers spreads 1.2 to 1.25 times as far as their mean
    by_size = math.log(least) + once * 1.25 * spread / math.sqrt(pairs)
    by_signs = -spread * normal.inv_cdf(_flips(pairs, _dissenters(pairs, rule), _FOUND**0.5))
    by_bound = 0.0
    for size, level in ((pairs, rule.alpha), (2 * pairs, rule.alpha / cases)):
        t = t_quantile(1 - level, size - 1)
        # a t statistic away from 0 spreads as its normal mean and the root of its variance do
        reach = t + once * math.sqrt(1 + t**2 / (2 * (size - 1)))
        by_bound = max(by_bound, math.log(rule.bound) + reach * spread / math.sqrt(size))
    return math.exp(max(by_size, by_signs, by_bound))


def _flips(pairs: int, dissenters: int, chance: float) -> float:
    """How likely a pair may be to dissent, if no more than `dissenters` shall with `chance`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        few = sum(
            math.comb(pairs, k) * p**k * (1 - p) ** (pairs - k) for k in range(dissenters + 1)
        )
        low, high = (p, high) if few > chance else (low, p)
    return low


def _least(one: Comparison, rule: Rule) -> float:
    """The ratio below which nothing counts."""
    ratio = rule.ratio if one.ratio is None else one.ratio
    return max(ratio, 1 + rule.noise_factor * (one.noise - 1))


def _floor(one: Comparison, rule: Rule) -> float:
    """The difference in seconds below which nothing counts."""
    return max(rule.seconds if one.seconds is None else one.seconds, one.timer_s)


def _against(one: Comparison, rule: Rule, rejected: bool) -> list[str]:
    """What speaks against calling B slower; nothing does where all conditions hold."""
    reasons = _too_small(one, rule)
    if not rejected:
        reasons.append(f"not above {rule.bound - 1:.1%} with certainty")
    if sum(log <= 0 for log in one.logs) > _dissenters(len(one.logs), rule):
        reasons.append("pairs disagree in sign")
    return reasons


def _too_small(one: Comparison, rule: Rule) -> list[str]:
    """What makes a slowdown too small to count, be it certain or not."""
    reasons, least = [], _least(one, rule)
    if _ratio(one) <= least:
        reasons.append(f"median ratio below {least:.3f}")
    floor = _floor(one, rule)
    if statistics.median(b - a for a, b in one.pairs) <= floor:
        reasons.append(f"median difference below {floor * 1e6:.3g} us")
    return reasons


def _tail(one: Comparison, rule: Rule) -> float:
    """p of: the mean ratio is no more than `bound`."""
    statistic = (statistics.fmean(one.logs) - math.log(rule.bound)) / one.error
    return t_tail(statistic, len(one.pairs) - 1)


def _levels(tails: Sequence[float], alpha: float) -> list[tuple[bool, float]]:
    """For each test whether it is rejected, and the level it was held to."""
    return list(zip(*holm(tails, alpha), strict=True)) if tails else []


def holm(tails: Sequence[float], alpha: float) -> tuple[list[bool], list[float]]:
    """Which hypotheses fall, and the level each p was held to, by Holm's step-down procedure.

    What comes after the first that stands is held to the level of that one.
    """
    count, fell = len(tails), 0
    rejected, levels = [False] * count, [alpha] * count
    order = sorted(range(count), key=lambda i: tails[i])
    while fell < count and tails[order[fell]] <= alpha / (count - fell):
        rejected[order[fell]], levels[order[fell]] = True, alpha / (count - fell)
        fell += 1
    for i in order[fell:]:
        levels[i] = alpha / (count - fell)
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


@functools.lru_cache(maxsize=1024)
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
