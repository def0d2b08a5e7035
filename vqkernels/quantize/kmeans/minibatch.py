"""Mini-batch k-means: entries follow batches, ever more slowly.

Sculley 2010 ("Web-scale k-means clustering"): an entry that has seen weight v moves by w / v of the
way to a point of weight w, so it stays the mean of all the points it was ever given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.block import Block, Codes, Floats
from vqkernels.quantize.kmeans.lloyd import Rule, respread
from vqkernels.quantize.kmeans.merging import near_equal

__all__ = ["passes", "step"]


def passes(
    block: Block, rule: Rule, centroids: Tensor, count: int, size: int, draws: np.random.Generator
) -> Tensor:
    """Centroids after `count` passes over the points, each in random batches of `size`.

    An entry that had no points in a pass, or has merged, is put elsewhere and starts anew.
    """
    sets, entries, length = centroids.shape
    seen = np.zeros((length, sets * entries))
    for turn in range(count):
        before = seen
        order = draws.permutation(block.points.shape[1])
        for first in range(0, len(order), size):
            batch = block.take(torch.from_numpy(order[first : first + size]))
            moved, seen = step(batch, batch.nearest(centroids), centroids, seen)
            centroids = rule.allowed(moved, centroids)
        empty = (seen == before).all(0).reshape(sets, entries)
        if rule.merge is not None and turn + 1 < count:
            empty |= near_equal(centroids, rule.merge)
        if empty.any():
            centroids = respread(block, rule, centroids, block.nearest(centroids), empty)
            seen[:, empty.ravel()] = 0
    return centroids


def step(block: Block, codes: Codes, centroids: Tensor, seen: Floats) -> tuple[Tensor, Floats]:
    """Centroids, and the weight they have seen, after one batch with these codes.

    seen: `[length, sets * entries]`.
    """
    sums, mass = block.sums(codes, centroids.shape[1])
    after = seen + mass
    old = centroids.double().numpy().reshape(-1, len(sums)).T
    moved = np.divide(sums - mass * old, after, out=np.zeros_like(old), where=after > 0) + old
    return torch.from_numpy(moved.T.reshape(centroids.shape)).float(), after
