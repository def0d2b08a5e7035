"""First entries of a clustering: each is one of the points.

k-means++: Arthur and Vassilvitskii 2007.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.block import MANY_ENTRIES, Block

__all__ = ["plus_plus", "random_points"]

# k-means++ draws one entry a round, and each round reads every point. Past this number of entries a
# round draws several (as k-means||, Bahmani et al. 2012, but without a second clustering): 65,536
# rounds over 2 million points would take a quarter of an hour.
ROUNDS = 1024
# From MANY_ENTRIES on, points for each entry that it draws from: every round reads all of them.
SEED_POINTS = 4


def plus_plus(block: Block, entries: int, draws: np.random.Generator) -> Tensor:
    """Drawn by weighted error so far, the first by weight alone: `[sets, entries, length]`."""
    if entries >= MANY_ENTRIES and block.points.shape[1] > SEED_POINTS * entries:
        some = draws.permutation(block.points.shape[1])[: SEED_POINTS * entries]
        block = block.take(torch.from_numpy(np.sort(some)))
    sets, count, length = block.points.shape
    centroids = torch.empty(sets, entries, length)
    errors = block.mass()
    rounds = min(entries, ROUNDS)
    shares = torch.from_numpy(draws.random((sets, rounds)))
    for turn in range(rounds):
        first, last = turn * entries // rounds, (turn + 1) * entries // rounds
        sums = errors.cumsum(-1, dtype=torch.float64)
        # one draw a round, spread evenly over the errors: stratified, so few points come twice
        offsets = torch.arange(last - first) + shares[:, turn, None]
        targets = offsets / (last - first) * sums[:, -1:]
        chosen = torch.searchsorted(sums, targets, right=True).clamp_(max=count - 1)
        centroids[:, first:last] = block.points[torch.arange(sets)[:, None], chosen]
        distances = block.distances(centroids[:, first:last])
        errors = distances if turn == 0 else torch.minimum(errors, distances)
    return centroids


def random_points(block: Block, entries: int, draws: np.random.Generator) -> Tensor:
    """Distinct points that have weight, all equally likely: `[sets, entries, length]`.

    Where there are too few of them, they come again.
    """
    chosen = []
    for points, mass in zip(block.points.numpy(), block.mass().numpy(), strict=True):
        order = draws.permutation(len(points))
        weighty = order[mass[order] > 0]
        # without any weight, any point is as good
        order = weighty if len(weighty) else order
        some = entries
        while True:
            _, first = np.unique(points[order[:some]], axis=0, return_index=True)
            if len(first) >= entries or some >= len(order):
                break
            some *= 2
        distinct = points[order[np.sort(first)]]
        chosen.append(distinct[np.arange(entries) % len(distinct)])
    return torch.from_numpy(np.stack(chosen))
