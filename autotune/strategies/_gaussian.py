"""A Gaussian process over a pool of configs: what is expected of each, and how surely.

Matérn 5/2 with a length for each feature (Rasmussen and Williams 2006), fitted by maximum a
posteriori. Between fits an observation adds a row to the Cholesky factor, so that a prediction of
20,000 configs costs one product with them, not a factorisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.candidates import Indices
from autotune.strategies._features import Feature

__all__ = ["GaussianProcess"]

_Floats = NDArray[np.float64]
_Singles = NDArray[np.float32]

# Priors, for a target of unit variance, as mean and deviation of a logarithm. Weight: 1/length².
# Names weigh less than scales: where both tell the same story, the scale says more of what is new.
_SCALE_WEIGHT = (-1.5, 1.0)
_NAME_WEIGHT = (-3.0, 1.0)
# Noise variance: times are medians, but the model's features leave something unsaid.
_NOISE = (-3.0, 1.0)
# Least variance of the noise, so that factors in float32 stay positive, and of a prediction.
_JITTER, _SURE = 1e-4, 1e-6
# Parameters stay within so many deviations of their priors: beyond, nothing but rounding speaks.
_REACH = 4.0
# The signal's variance is near 1: worth this many observations.
_SIGNAL_PRIOR = 2.0


class GaussianProcess:
    """Fit it on some of a pool's configs; `add` others; `predict` the whole pool."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self._features = features
        priors = [_NAME_WEIGHT if one.named else _SCALE_WEIGHT for one in features] + [_NOISE]
        self._mean, self._deviation = np.array(priors).T
        self._theta = self._mean.copy()

    def fit(self, rows: NDArray[np.int16], told: Indices, target: _Floats, steps: int) -> None:
        """Learn lengths and noise from the configs `told`, in `steps`, and forget the rest.

        rows: of the pool, `[pool, params]`. told: positions in it. target: one each.
        """
        squares = np.array([_squares(one.points(rows[told])) for one in self._features])
        self._theta = self._climb(squares.reshape(-1, len(told), len(told)), target, steps)
        weights = np.exp(self._theta[:-1] / 2)
        points = [one.points(rows) * w for one, w in zip(self._features, weights, strict=True)]
        self._points: _Singles = np.concatenate(points, axis=1, dtype=np.float32)
        self._norms: _Singles = (self._points**2).sum(axis=1)
        self._lower: _Floats = np.zeros((0, 0))
        self._across: _Singles = np.zeros((len(rows), 0), np.float32)
        self._variance: _Singles = np.ones(len(rows), np.float32)
        self.add(told)
        white = np.linalg.solve(self._lower, target)
        self._signal = (white @ white + _SIGNAL_PRIOR) / (len(target) + _SIGNAL_PRIOR)

    def add(self, told: Indices) -> None:
        """Condition on more configs of the pool; lengths and noise stay."""
        norms, points = self._norms, self._points
        squared = norms[:, None] + norms[told] - 2 * points @ points[told].T
        near = _matern(np.sqrt(5 * np.maximum(squared, 0)))
        known = self._across[told]
        noise = np.exp(self._theta[-1]) + _JITTER
        rest = near[told].astype(float) + noise * np.eye(len(told)) - known.astype(float) @ known.T
        corner = np.linalg.cholesky((rest + rest.T) / 2)
        fresh = np.linalg.solve(corner, (near - self._across @ known.T).T).T.astype(np.float32)
        top = np.pad(self._lower, ((0, 0), (0, len(told))))
        self._lower = np.concatenate([top, np.concatenate([known, corner], axis=1)])
        self._across = np.concatenate([self._across, fresh], axis=1)
        self._variance = np.maximum(self._variance - (fresh**2).sum(axis=1), _SURE)

    def mean(self, target: _Floats) -> _Singles:
        """What is expected of each config of the pool; target: of those told, in order."""
        white = np.linalg.solve(self._lower, target)
        mean: _Singles = self._across @ white.astype(np.float32)
        return mean

    @property
    def deviation(self) -> _Singles:
        """How far off the mean may be, for each config of the pool."""
        deviation: _Singles = np.sqrt(self._variance * np.float32(self._signal))
        return deviation

    def _climb(self, squares: _Floats, target: _Floats, steps: int) -> _Floats:
        """The best parameters on a path by signs of the slope (iRprop−, Igel and Hüsken 2000)."""
        theta, pace = self._theta.copy(), np.full(len(self._theta), 0.2)
        before = np.zeros(len(theta))
        low, high = (self._mean + side * _REACH * self._deviation for side in (-1, 1))
        best: _Floats = theta
        least = np.inf
        for _ in range(steps):
            loss, slope = self._loss(theta, squares, target)
            if loss < least:
                best, least = theta, loss
            turn = np.sign(slope) * np.sign(before)
            pace = np.clip(pace * np.choose((turn + 1).astype(int), [0.5, 1.0, 1.3]), 1e-3, 1.0)
            before = np.where(turn < 0, 0.0, slope)
            theta = (theta - np.sign(before) * pace).clip(low, high)
        return best

    def _loss(self, theta: _Floats, squares: _Floats, target: _Floats) -> tuple[float, _Floats]:
        """Negative log posterior and its slope; the signal's variance is its best value."""
        count, weights, noise = len(target), np.exp(theta[:-1]), np.exp(theta[-1])
        far = np.sqrt(5 * np.tensordot(weights, squares, 1))
        decay = np.exp(-far)
        kernel = (1 + far + far * far / 3) * decay + (noise + _JITTER) * np.eye(count)
        half = np.linalg.inv(np.linalg.cholesky(kernel))
        inverse = half.T @ half
        pull = inverse @ target
        total = count + _SIGNAL_PRIOR
        signal = (target @ pull + _SIGNAL_PRIOR) / total
        off = (theta - self._mean) / self._deviation
        loss = total * np.log(signal) / 2 - np.log(np.diag(half)).sum() + off @ off / 2
        by_kernel = (inverse - np.outer(pull, pull) / signal) / 2
        by_square = by_kernel * (-5 / 6 * (1 + far) * decay)
        slope = np.append(
            np.tensordot(squares, by_square, 2) * weights, np.trace(by_kernel) * noise
        )
        return float(loss), slope + off / self._deviation


def _matern(far: _Singles) -> _Singles:
    return ((1 + far + far * far / 3) * np.exp(-far)).astype(np.float32)


def _squares(points: _Floats) -> _Floats:
    """Squared distances between all pairs of points."""
    norms = (points**2).sum(axis=1)
    squared: _Floats = np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0)
    return squared
