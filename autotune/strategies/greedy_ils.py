"""Greedy iterated local search: climb to a local best, kick, climb again.

The first neighbour that is faster is taken; neighbours differ in one parameter. A kick starts from
the best of all, so that it explores around what is known to be good (Lourenço, Martin and Stützle
2003; Kernel Tuner's greedy_ils does the same over its spaces).
"""

from __future__ import annotations

import numpy as np

from autotune.candidates import Candidates
from autotune.strategies import Search, Strategy
from autotune.strategies._asked import Asked

__all__ = ["STRATEGY", "search"]

# Steps of a kick, and the chance to start anywhere instead: local bests may lie far apart.
_KICK, _RESTART = 3, 0.1


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Climb from a random candidate, then from kicked ones."""
    asked = Asked(candidates, batch)
    while not asked.done:
        known = len(asked.order)
        yield from _climb(asked, _start(asked, rng), rng)
        if len(asked.order) == known:  # everything around here is known
            yield from asked.ask([int(rng.choice(asked.left))])


def _start(asked: Asked, rng: np.random.Generator) -> int:
    best = asked.best
    if best is None or rng.random() < _RESTART:
        return int(rng.choice(asked.left))
    for _ in range(_KICK):
        around = asked.candidates.neighbours(best)
        best = int(rng.choice(around)) if len(around) else best
    return best


def _climb(asked: Asked, at: int, rng: np.random.Generator) -> Search:
    yield from asked.ask([at])
    climbing = True
    while climbing:
        climbing = False
        around = rng.permutation(asked.candidates.neighbours(at))
        for start in range(0, len(around), asked.batch):
            some = around[start : start + asked.batch]
            yield from asked.ask(some)
            fastest = int(some[np.argmin(asked.seconds[some])])
            if asked.seconds[fastest] < asked.seconds[at]:
                at, climbing = fastest, True
                break


STRATEGY = Strategy(
    name="greedy_ils", search=search, about="climb to a local best, kick it, climb again"
)
