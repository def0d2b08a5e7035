"""Candidates in random order: what any other strategy has to beat."""

from __future__ import annotations

import numpy as np

from autotune.candidates import Candidates
from autotune.strategies import Search, Strategy
from autotune.strategies._asked import Asked

__all__ = ["STRATEGY", "search"]


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Ask for all, shuffled."""
    yield from Asked(candidates, batch).ask(candidates.sample(rng, len(candidates)))


STRATEGY = Strategy(name="random", search=search, about="candidates in random order")
