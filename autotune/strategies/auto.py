"""The default: everything where the space is small, else the surrogate."""

from __future__ import annotations

import numpy as np

from autotune.candidates import Candidates
from autotune.strategies import Search, Strategy, exhaustive, surrogate

__all__ = ["STRATEGY", "search"]

# A model of so few configs costs more than it saves: any budget pays for all of them.
_SMALL = 32


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Search as the space's size suggests."""
    if len(candidates) <= _SMALL:
        return exhaustive.search(candidates, rng, batch=batch)
    return surrogate.search(candidates, rng, batch=batch)


STRATEGY = Strategy(name="auto", search=search, about="exhaustive where small, else surrogate")
