"""k-medoids: k-means whose entries are points.

Alternating, as in Park and Jun 2009 ("A simple and fast algorithm for K-medoids clustering"). The
dissimilarity is the squared error, which is what a decoded weight is off by. With it the medoid of
a cluster is its point nearest to the mean, `sum_i w_i |x_i - m|^2` being
`sum_i w_i |x_i - mean|^2 + (sum_i w_i) |mean - m|^2`, so no distances between points are needed.
It starts from what k-means found: 256 medoids of 73,728 normal vectors of 8 then lose 5 % against
means, and 15 % from k-means++ alone, as medoids hardly move once they are there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.block import Block, Codes, Flags
from vqkernels.quantize.kmeans.lloyd import Rule

__all__ = ["medoid_numbers", "medoid_rule"]


def medoid_rule(block: Block) -> Rule:
    """Of k-medoids, for this block's points and weights."""

    def middle(codes: Codes, old: Tensor) -> tuple[Tensor, Flags]:
        index = _medoids(block, codes, old.shape[1])
        chosen = block.points[torch.arange(len(old))[:, None], index.clamp(min=0)]
        return torch.where(index[..., None] < 0, old, chosen), (index < 0).numpy()

    return Rule(block.nearest, middle, lambda entries, _: entries)


def medoid_numbers(block: Block, entries: Tensor) -> Tensor:
    """Number of the point that each entry is, among its set's; 0 for one that no point uses."""
    return _medoids(block, block.nearest(entries), entries.shape[1]).clamp(min=0)


def _medoids(block: Block, codes: Codes, entries: int) -> Tensor:
    """Number of each code's medoid among its set's points, -1 where it has none with weight."""
    sets, count, length = block.points.shape
    columns, mass = block.sums(codes, entries)
    flat = (codes + np.arange(sets)[:, None] * entries).ravel()
    means = np.divide(columns, mass, out=np.zeros_like(columns), where=mass > 0)
    away = np.zeros(sets * count)
    for j in range(length):
        offset = block.points[..., j].double().numpy().ravel() - means[j, flat]
        away += np.square(offset) * mass[j, flat]
    away[block.mass().numpy().ravel() == 0] = np.inf
    order = np.lexsort((away, flat))
    first = order[np.flatnonzero(np.diff(flat[order], prepend=-1))]
    found = np.full(sets * entries, -1, np.int64)
    found[flat[first]] = np.where(np.isfinite(away[first]), first % count, -1)
    return torch.from_numpy(found.reshape(sets, entries))
