"""A genetic algorithm over valid configs: ranked parents, uniform crossover, few mutations.

A child that no rule lets through, or that is known, becomes a neighbour of its first parent that
is new, so that every evaluation is spent on something valid and unseen.
"""

from __future__ import annotations

import numpy as np

from autotune.candidates import Candidates
from autotune.strategies import Search, Strategy
from autotune.strategies._asked import Asked

__all__ = ["STRATEGY", "search"]

# Small: the budgets of tuning are hundreds of configs, and a generation has to pay before that.
_POPULATION, _CHILDREN = 20, 10
_MUTATION = 0.1


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Breed from the fastest of all that was asked for."""
    asked = Asked(candidates, batch)
    yield from asked.ask(candidates.sample(rng, _POPULATION))
    while not asked.done:
        order = np.array(asked.order, np.int64)
        ranked = order[np.argsort(asked.seconds[order], kind="stable")[:_POPULATION]]
        children: list[int] = []
        for _ in range(_CHILDREN):
            # Rank selection: the fastest is twice as likely as the middle one.
            weights = np.arange(len(ranked), 0, -1)
            pair = rng.choice(ranked, 2, p=weights / weights.sum())
            children.append(_child(asked, int(pair[0]), int(pair[1]), set(children), rng))
            if len(children) >= len(candidates) - len(order):
                break
        yield from asked.ask(children)


def _child(
    asked: Asked, mother: int, father: int, taken: set[int], rng: np.random.Generator
) -> int:
    candidates = asked.candidates
    row = np.where(
        rng.random(len(candidates.params)) < 0.5, candidates.rows[mother], candidates.rows[father]
    )
    for at in np.flatnonzero(rng.random(len(row)) < _MUTATION):
        row[at] = rng.integers(len(candidates.params[at].values))
    found = candidates.at_row(row)
    if found is not None and np.isnan(asked.seconds[found]) and found not in taken:
        return found
    for choices in (candidates.neighbours(mother), asked.left):
        new = [int(c) for c in choices if np.isnan(asked.seconds[c]) and int(c) not in taken]
        if new:
            return int(rng.choice(new))
    raise AssertionError("no more children are bred than there are candidates left")


STRATEGY = Strategy(name="genetic", search=search, about="breed from the fastest configs")
