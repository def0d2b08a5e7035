"""Codebooks learned from batches, as a VQ-VAE's: by moving averages, or by gradients.

van den Oord, Vinyals and Kavukcuoglu 2017 ("Neural discrete representation learning"): entries
follow what is coded, by exponential moving averages of counts and sums (appendix A.1 there) or by
the gradient of `|z - e|^2`. An entry that hardly anything uses expires: it is put on a vector of
the batch (Dhariwal et al. 2020, "Jukebox").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.coding import assign
from vqkernels.quantize.recipe import Recipe
from vqkernels.threads import one_thread

__all__ = ["MovingAverage", "learn"]


class MovingAverage:
    """Codebooks `entries: [sets, entries, length]` that follow batches by moving averages.

    decay: share of what was known that stays at each step.
    mass, sums: averages of each entry's weights and weighted vectors, shaped as `entries`.
    """

    def __init__(self, entries: Tensor, *, decay: float) -> None:
        self.entries = entries.clone()
        self.mass = torch.zeros_like(entries)
        self.sums = torch.zeros_like(entries)
        self.decay = decay

    def count(self, points: Tensor, codes: Tensor, weights: Tensor | None = None) -> None:
        """Average `points: [sets, count, length]`, which have these codes, in; entries stay.

        weights: None, `[sets, count]` or `[sets, count, length]`.
        """
        each = _per_coordinate(points, weights)
        mass, sums = (_summed(one, codes, self.entries) for one in (each, each * points))
        self.mass = self.decay * self.mass + (1 - self.decay) * mass
        self.sums = self.decay * self.sums + (1 - self.decay) * sums

    def follow(self) -> None:
        """Move each entry to the average of its vectors; one that never had any stays."""
        mean = self.sums / self.mass.clamp(min=torch.finfo(self.mass.dtype).tiny)
        self.entries = torch.where(self.mass > 0, mean, self.entries)

    def expire(
        self, points: Tensor, draws: Tensor, share: float, weights: Tensor | None = None
    ) -> None:
        """Put entries with less than `share` of the mean mass on vectors of the batch.

        draws: `[sets, entries]` in [0, 1), which vector each entry would get, by their weights.
        """
        mass = self.mass.sum(-1)
        mean = mass.mean(-1, keepdim=True)
        dead = mass < share * mean
        sums = _per_coordinate(points, weights).sum(-1, dtype=torch.float64).cumsum(-1)
        chosen = torch.searchsorted(sums, draws.double() * sums[:, -1:], right=True)
        chosen.clamp_(max=points.shape[1] - 1)
        fresh = points.gather(1, chosen[..., None].expand_as(self.entries))
        self.entries = torch.where(dead[..., None], fresh, self.entries)
        # as heavy as the others: it would expire at the next step otherwise
        heavy = (mean / self.mass.shape[-1])[..., None].expand_as(self.mass)
        self.mass = torch.where(dead[..., None], heavy, self.mass)
        self.sums = torch.where(dead[..., None], fresh * heavy, self.sums)


def learn(
    points: Tensor,
    first: Tensor,
    *,
    weights: Tensor | None = None,
    recipe: Recipe,
    seed: int | tuple[int, ...] = 0,
) -> Tensor:
    """Codebooks of `points: [sets, count, length]`, from `first: [sets, entries, length]`.

    recipe.iterations: times that all points are gone through, in random batches of recipe.batch.
    recipe.clustering: `ema`, or `gradient`: Adam on the squared error at recipe.rate times the
        root mean square of a set's points, which falls to 0 with half a cosine.
    weights: of squared errors: None, `[sets, count]` or `[sets, count, length]`.
    """
    draws = np.random.default_rng(seed)
    sets, count, _ = points.shape
    size = min(recipe.batch, count)
    each = None if weights is None else _per_coordinate(points, weights)
    learner = (_Average if recipe.clustering == "ema" else _Descent)(
        points, each, first, recipe, steps=recipe.iterations * max(1, count // size)
    )
    with one_thread():
        for _ in range(recipe.iterations):
            order = draws.permutation(count)
            for start in range(0, count - size + 1, size):
                index = torch.from_numpy(order[start : start + size])
                batch, mass = points[:, index], None if each is None else each[:, index]
                codes = assign(batch, learner.entries, weights=mass)
                expired = torch.from_numpy(draws.random((sets, first.shape[1])))
                learner.step(batch, codes, mass, expired)
    return learner.entries


class _Average:
    """`ema`: a MovingAverage over the batches."""

    def __init__(
        self,
        _points: Tensor,
        _weights: Tensor | None,
        first: Tensor,
        recipe: Recipe,
        *,
        steps: int,
    ) -> None:
        # a decay that has forgotten the first entries by the end, where there are few steps
        self._average = MovingAverage(first, decay=min(recipe.decay, 1 - 1 / max(2, steps)))
        self._expiry = recipe.expiry

    @property
    def entries(self) -> Tensor:
        return self._average.entries

    def step(self, batch: Tensor, codes: Tensor, mass: Tensor | None, draws: Tensor) -> None:
        self._average.count(batch, codes, mass)
        self._average.follow()
        self._average.expire(batch, draws, self._expiry, mass)


class _Descent:
    """`gradient`: Adam on the codebook loss, with expiry by a moving average of the counts."""

    def __init__(
        self,
        points: Tensor,
        weights: Tensor | None,
        first: Tensor,
        recipe: Recipe,
        *,
        steps: int,
    ) -> None:
        # numpy: torch's sum of many numbers rounds differently with the number of threads
        mass = _per_coordinate(points, weights).double()
        squares, total = (
            one.numpy().sum((1, 2)) for one in (points.double().square() * mass, mass)
        )
        # weights are about 1 then: Adam's epsilon would hold steps back where all are tiny
        self._mass = max(float(total.sum()) / mass.numel(), 1e-300)
        unit = np.sqrt(squares / np.maximum(total, 1e-300))
        unit = torch.from_numpy(unit).float()[:, None, None]
        self._unit = torch.where(unit > 0, unit, 1.0)
        self._entries = (first / self._unit).requires_grad_()
        self._adam = torch.optim.Adam([self._entries], lr=recipe.rate)
        self._rate = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, T_max=max(1, steps))
        self._use = MovingAverage(first, decay=recipe.decay)
        self._expiry = recipe.expiry

    @property
    def entries(self) -> Tensor:
        return self._entries.detach() * self._unit

    def step(self, batch: Tensor, codes: Tensor, mass: Tensor | None, draws: Tensor) -> None:
        chosen = self._entries.gather(1, codes[..., None].expand(*codes.shape, batch.shape[-1]))
        errors = (chosen - batch / self._unit).square() * (
            1.0 if mass is None else mass / self._mass
        )
        self._adam.zero_grad()
        errors.sum().backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        self._adam.step()
        self._rate.step()
        self._use.entries = self.entries
        self._use.count(batch, codes, mass)
        self._use.expire(batch, draws, self._expiry, mass)
        with torch.no_grad():
            self._entries.copy_(self._use.entries / self._unit)


def _per_coordinate(points: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.ones_like(points)
    return weights.expand_as(points) if weights.ndim == 3 else weights[..., None].expand_as(points)


def _summed(values: Tensor, codes: Tensor, like: Tensor) -> Tensor:
    """Sum of `values: [sets, count, length]` of each code: `[sets, entries, length]`."""
    return torch.zeros_like(like).scatter_add_(1, codes[..., None].expand_as(values), values)
