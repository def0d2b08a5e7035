"""Bayesian optimisation over numbered candidates: a Gaussian process, expected improvement.

Every candidate is scored at each step (Jones, Schonlau and Welch 1998), so there is no inner
search that could miss one, and none that is invalid. Times enter as logarithms, and those above
the median all as the median: how slow a slow config is says nothing about the fast ones, and a
model that needn't explain it explains the fast end better. What fails counts as slow, and the
chance that a config fails, from the same kernel, weighs its gain.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from autotune.candidates import Candidates, Indices
from autotune.strategies import Search, Strategy
from autotune.strategies._asked import Asked
from autotune.strategies._features import Feature, features
from autotune.strategies._gaussian import GaussianProcess

__all__ = ["STRATEGY", "search"]

# The design that the model starts from, far apart, picked out of so many drawn ones.
_DESIGN, _DRAWN = 10, 2000
# Lengths are learned again after so many outcomes, or this share of them where that is more.
_REFIT, _REFIT_SHARE = 8, 16
# The first fit starts from the priors, a later one from the last.
_FIRST_STEPS, _STEPS = 30, 15
# At most this many outcomes are fitted (the fastest half of it, and an even sample of the rest) and
# this many candidates scored: a step stays at some 10 ms, however long the search or large the
# space.
_TOLD, _POOL = 400, 20_000
# In a pool that isn't everything: around how many of the fastest all neighbours are scored.
_AROUND = 20

_Floats = NDArray[np.float64]


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Ask for a spread-out design, then for whatever is expected to improve most."""
    asked = Asked(candidates, batch)
    views = features(candidates)
    yield from asked.ask(_spread(candidates, views, rng))
    model = _Model(asked, views, rng)
    while not asked.done:
        yield from asked.ask(model.choose(batch))


def _spread(candidates: Candidates, views: list[Feature], rng: np.random.Generator) -> Indices:
    """Configs that are far from each other: each next one is the farthest of those drawn."""
    drawn = candidates.sample(rng, _DRAWN)
    if not len(drawn):
        return drawn
    rows = candidates.rows[drawn]
    points = np.concatenate([np.zeros((len(drawn), 1)), *(v.points(rows) for v in views)], axis=1)
    chosen, nearest = [0], np.full(len(drawn), math.inf)
    while len(chosen) < min(_DESIGN, len(drawn)):
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return drawn[chosen]


class _Model:
    """The process, the pool that it scores, and which outcomes it was told."""

    def __init__(self, asked: Asked, views: list[Feature], rng: np.random.Generator) -> None:
        self._asked, self._rng = asked, rng
        self._process = GaussianProcess(views)
        self._threads = ThreadpoolController()
        self._pool: Indices = np.zeros(0, np.int64)
        self._told: Indices = np.zeros(0, np.int64)  # positions in the pool
        self._fitted = self._seen = 0

    def choose(self, count: int) -> list[int]:
        """The next `count` candidates; each is chosen as if those before it had just been met.

        On one thread: these matrices are small, compilers want the other cores, and a pool that
        spins on after its work would disturb what is timed next.
        """
        with self._threads.limit(limits=1, user_api="blas"):
            return self._choose(count)

    def _choose(self, count: int) -> list[int]:
        self._update()
        target, failed = self._target(), self._failed()
        least = target.min()
        chosen: list[tuple[int, int]] = []
        for _ in range(min(count, len(self._asked.left))):
            mean, deviation = self._process.mean(target), self._process.deviation
            gain = np.log(deviation) + _log_gain((least - mean) / deviation)
            if failed.any():
                gain += np.log(1 - self._risk(failed))
            gain[~np.isnan(self._asked.seconds[self._pool])] = -math.inf
            gain[[at for at, _ in chosen]] = -math.inf
            at = int(gain.argmax())
            chosen.append((at, int(self._pool[at])))
            if len(chosen) < count:
                target, failed = np.append(target, mean[at]), np.append(failed, False)
                self._tell(np.array([at]))
        if len(chosen) > 1:
            self._fitted = 0  # what was only imagined goes with the next fit
        return [index for _, index in chosen]

    def _update(self) -> None:
        order = np.array(self._asked.order, np.int64)
        due = max(_REFIT, len(order) // _REFIT_SHARE)
        if self._fitted == 0 or len(order) - self._fitted >= due:
            steps = _STEPS if len(self._told) else _FIRST_STEPS
            self._pool, told = self._draw(), self._fittest(order)
            self._told = np.searchsorted(self._pool, told)
            self._process.fit(
                self._asked.candidates.rows[self._pool], self._told, self._target(), steps
            )
            self._fitted = len(order)
        else:
            self._tell(np.searchsorted(self._pool, order[self._seen :]))
        self._seen = len(order)

    def _tell(self, positions: Indices) -> None:
        self._process.add(positions)
        self._told = np.append(self._told, positions)

    def _draw(self) -> Indices:
        """The candidates to score, in order: all, or a sample and what lies around the fastest."""
        asked = self._asked
        if len(asked.candidates) <= _POOL:
            return np.arange(len(asked.candidates))
        order = np.array(asked.order, np.int64)
        fastest = order[np.argsort(asked.seconds[order], kind="stable")[:_AROUND]]
        around = [asked.candidates.neighbours(int(at)) for at in fastest]
        left = asked.left
        drawn = self._rng.choice(left, min(_POOL, len(left)), replace=False)
        return np.unique(np.concatenate([drawn, order, *around]))

    def _fittest(self, order: Indices) -> Indices:
        if len(order) <= _TOLD:
            return order
        ranked = order[np.argsort(self._asked.seconds[order], kind="stable")]
        half = _TOLD // 2
        rest = self._rng.choice(ranked[half:], half, replace=False)
        return np.concatenate([ranked[:half], rest])

    def _target(self) -> _Floats:
        """Standardised log times of those told, the slower half and failures at the median."""
        times = np.log(self._asked.seconds[self._pool[self._told]])
        usable = times[np.isfinite(times)]
        if not len(usable):
            return np.zeros(len(times))
        clipped = np.minimum(times, max(float(np.median(usable)), usable.min() + 1e-3))
        target: _Floats = (clipped - clipped.mean()) / (clipped.std() + 1e-9)
        return target

    def _failed(self) -> NDArray[np.bool_]:
        failed: NDArray[np.bool_] = np.isinf(self._asked.seconds[self._pool[self._told]])
        return failed

    def _risk(self, failed: NDArray[np.bool_]) -> _Floats:
        """The chance that a config of the pool fails, between 0 and 0.99."""
        share = (failed.sum() + 0.5) / (len(failed) + 1)
        risk: _Floats = share + self._process.mean(failed - share).astype(float)
        return risk.clip(0, 0.99)


# log(φ(u) + u·Φ(u)), what is gained on average where the mean lies u deviations below the least:
# by a table, since numpy has no Φ; in the far tail, where the sum cancels, by its series.
_TAIL = -6.0
_GRID = np.linspace(_TAIL, 10.0, 4001)
_TABLE = np.array(
    [
        math.log(math.exp(-u * u / 2) / math.sqrt(2 * math.pi) + u * math.erfc(-u / 2**0.5) / 2)
        for u in _GRID.tolist()
    ]
)


def _log_gain(u: NDArray[np.float32]) -> _Floats:
    far = np.minimum(u, _TAIL).astype(float)
    series = -far * far / 2 - math.log(2 * math.pi) / 2 - 2 * np.log(-far)
    gain: _Floats = np.where(u < _TAIL, series, np.interp(u, _GRID, _TABLE))
    return gain


STRATEGY = Strategy(
    name="surrogate",
    search=search,
    about="a Gaussian process over all candidates; asks where it expects to gain most",
)
