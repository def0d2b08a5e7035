"""What entries are held to: a largest norm, or the unit sphere; and how near they may come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from vqkernels.quantize.kmeans.block import Block
from vqkernels.quantize.kmeans.lloyd import Rule

__all__ = ["limited", "merging", "on_sphere", "rms_norms", "shortened"]


def limited(block: Block, rule: Rule, norms: Tensor) -> Rule:
    """`rule` with entries of at most `norms: [sets]`, in the units of what was given.

    Cut along their direction, which for weights of whole points is the best entry allowed.
    """
    return dataclasses.replace(
        rule, allowed=_outside(block, lambda entries, _: shortened(entries, norms))
    )


def on_sphere(block: Block, rule: Rule) -> Rule:
    """`rule` with entries of norm 1; points have it already."""

    def allowed(entries: Tensor, before: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(entries.double(), dim=-1, keepdim=True)
        # points that cancel out have no direction in common
        return torch.where(norms > 1e-6, entries / norms.clamp(min=1e-6), before).float()

    return dataclasses.replace(rule, allowed=_outside(block, allowed))


def merging(block: Block, rule: Rule, distances: Tensor) -> Rule:
    """`rule` where entries nearer than `distances: [sets]`, as given, become one."""
    return dataclasses.replace(
        rule, merge=distances * torch.exp2(-block.exponent.double().reshape(-1))
    )


def shortened(entries: Tensor, norms: Tensor) -> Tensor:
    """Each of `entries: [sets, entries, length]` cut to its set's norm, where it is longer."""
    # a float32 entry may come out one rounding longer than its float64 self
    most = norms.double()[:, None, None] * (1 - 1e-6)
    long = torch.linalg.vector_norm(entries.double(), dim=-1, keepdim=True)
    return torch.where(long > most, entries * (most / long.clamp(min=1e-300)), entries).float()


def rms_norms(points: Tensor, weights: Tensor | None) -> Tensor:
    """Root mean square norm of each set's points that have weight: `[sets]` float64."""
    squares = points.double().square().sum(-1).numpy()
    if weights is None:
        return torch.from_numpy(squares.mean(-1)).sqrt()
    seen = (weights > 0 if weights.ndim == 2 else (weights > 0).any(-1)).numpy()
    # numpy: torch's sum of many numbers rounds differently with the number of threads
    total = (squares * seen).sum(-1) / seen.sum(-1).clip(min=1)
    return torch.from_numpy(total).sqrt()


def _outside(
    block: Block, allowed: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """`allowed` for entries as they were given, as a rule has it for the block's."""
    return lambda entries, before: block.enter(
        allowed(block.restore(entries), block.restore(before))
    )
