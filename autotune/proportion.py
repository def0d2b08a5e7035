"""How far a share may be from what was counted."""

from __future__ import annotations

import math

__all__ = ["interval"]


def interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of the chance of a success, true together with probability `level`.

    Exact for every count, also for none and all (C. Clopper and E. Pearson, "The use of confidence
    or fiducial limits illustrated in the case of the binomial", 1934). Without trials: 0 and 1.
    """
    if not 0 <= successes <= trials or not 0 < level < 1:
        raise ValueError(f"{successes} of {trials} at level {level}: no share")
    side = (1 - level) / 2
    return _lower(successes, trials, side), 1 - _lower(trials - successes, trials, side)


def _lower(successes: int, trials: int, side: float) -> float:
    """The chance at which so many successes or more have probability `side`, by bisection."""
    if not successes:
        return 0.0
    low, high = 0.0, successes / trials
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(successes, trials, middle) < side else (low, middle)
    return low


def _tail(successes: int, trials: int, chance: float) -> float:
    """Probability of `successes` or more, whose share is no less than `chance`."""
    if chance == 0:
        return 0.0
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1)
    ways -= math.lgamma(trials - successes + 1)
    log = ways + successes * math.log(chance) + (trials - successes) * math.log1p(-chance)
    # above the mean each term is smaller than the one before
    term = total = math.exp(log)
    for count in range(successes, trials):
        term *= (trials - count) / (count + 1) * chance / (1 - chance)
        total += term
        if term < 1e-16 * total:
            break
    return total
