"""Lloyd's iterations: each point to its entry, each entry to the middle of its points.

Lloyd 1957 (published 1982). What "its entry" and "the middle" are is a Rule: means for the squared
error; others for the L1 error, for entries that are points, for entries on a sphere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.block import Block, Codes, Flags
from vqkernels.quantize.kmeans.coding import point_errors
from vqkernels.quantize.kmeans.merging import near_equal

__all__ = ["Rule", "iterate", "mean_rule", "respread"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of clustering of a block's points.

    nearest: code of each point, from the entries.
    middle: the entries for these codes, from the codes and the entries before, which stay where a
        code has no points; and which have none.
    allowed: the entries that are allowed nearest to new ones; the ones before come second.
    merge: distance below which two entries of a set are one, `[sets]`; None: never.
    """

    nearest: Callable[[Tensor], Codes]
    middle: Callable[[Codes, Tensor], tuple[Tensor, Flags]]
    allowed: Callable[[Tensor, Tensor], Tensor]
    merge: Tensor | None = None


def mean_rule(block: Block) -> Rule:
    """Of k-means: squared errors and weighted means."""
    return Rule(block.nearest, block.means, lambda entries, _: entries)


def iterate(block: Block, rule: Rule, centroids: Tensor, iterations: int) -> Tensor:
    """Centroids after `iterations` of assignment and middle, or fewer where nothing changes."""
    before: Codes | None = None
    for turn in range(iterations):
        codes = rule.nearest(centroids)
        if before is not None and np.array_equal(codes, before):
            break
        found, empty = rule.middle(codes, centroids)
        found = rule.allowed(found, centroids)
        if rule.merge is not None and turn + 1 < iterations:
            # not in the last turn: what is freed would get no points of its own any more
            empty = empty | near_equal(found, rule.merge)
        centroids = respread(block, rule, found, codes, empty) if empty.any() else found
        before = codes
    return centroids


def respread(block: Block, rule: Rule, centroids: Tensor, codes: Codes, empty: Flags) -> Tensor:
    """Put each set's j-th unused code on the farthest point of its cluster with j-th most error."""
    sets, entries, length = centroids.shape
    errors = point_errors(block.points, centroids, torch.from_numpy(codes), block.weights)
    error = errors.numpy().ravel()
    flat = (codes + np.arange(sets)[:, None] * entries).ravel()
    spent = np.bincount(flat, error, minlength=sets * entries).reshape(sets, entries)
    order = np.lexsort((error, flat))
    ends = order[np.flatnonzero(np.diff(flat[order], append=-1))]
    farthest = np.zeros(sets * entries, np.int64)
    farthest[flat[ends]] = ends
    heaviest = np.argsort(-spent, axis=1, kind="stable")
    donor = np.take_along_axis(heaviest, np.maximum(np.cumsum(empty, axis=1) - 1, 0), axis=1)
    useful = empty & (np.take_along_axis(spent, donor, axis=1) > 0)
    source = np.take_along_axis(farthest.reshape(sets, entries), donor, axis=1)
    moved, before = torch.from_numpy(useful), centroids
    centroids = centroids.clone()
    centroids[moved] = block.points.reshape(-1, length)[torch.from_numpy(source[useful])]
    return rule.allowed(centroids, before)
