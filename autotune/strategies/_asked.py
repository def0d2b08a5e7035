"""What a search has asked for so far, by the candidates' numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from autotune.candidates import Candidates, Indices
from autotune.strategies import Search

__all__ = ["Asked"]


class Asked:
    """Seconds of each candidate: NaN where it wasn't asked for, infinity where it failed.

    batch: how many go out at once at most.
    """

    def __init__(self, candidates: Candidates, batch: int = 1) -> None:
        self.candidates, self.batch = candidates, batch
        self.seconds: NDArray[np.float64] = np.full(len(candidates), math.nan)
        self.order: list[int] = []

    def ask(self, indices: Iterable[int]) -> Search:
        """Ask (by `yield from`) for those of `indices` that are new; others' outcomes are known."""
        fresh = [int(at) for at in dict.fromkeys(indices) if math.isnan(self.seconds[at])]
        for start in range(0, len(fresh), self.batch):
            sent = fresh[start : start + self.batch]
            outcomes = yield [self.candidates[at] for at in sent]
            for at, outcome in zip(sent, outcomes, strict=True):
                self.seconds[at] = math.inf if outcome.seconds is None else outcome.seconds
            self.order += sent

    @property
    def left(self) -> Indices:
        """Candidates that nobody asked for yet, in order."""
        return np.flatnonzero(np.isnan(self.seconds))

    @property
    def done(self) -> bool:
        """Everything was asked for."""
        return len(self.order) == len(self.candidates)

    @property
    def best(self) -> int | None:
        """The fastest so far, or None where nothing is usable yet."""
        asked = np.array(self.order, np.int64)
        if not np.isfinite(self.seconds[asked]).any():
            return None
        return int(asked[np.argmin(self.seconds[asked])])
