"""Every candidate in the space's own order, simplest values first."""

from __future__ import annotations

import numpy as np

from autotune.candidates import Candidates
from autotune.strategies import Search, Strategy
from autotune.strategies._asked import Asked

__all__ = ["STRATEGY", "search"]


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Ask for all, in order; `rng` is for strategies that draw."""
    del rng
    yield from Asked(candidates, batch).ask(range(len(candidates)))


STRATEGY = Strategy(name="exhaustive", search=search, about="every candidate, in order")
