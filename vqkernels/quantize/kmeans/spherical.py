"""Spherical k-means: codes by the largest cosine, entries in the direction of their points.

Dhillon and Modha 2001 ("Concept decompositions for large sparse text data using clustering"). On
the unit sphere the largest cosine is the nearest entry, so this is k-means of the points'
directions with entries held to the sphere. An entry then gets the length that serves its points
best.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqkernels.quantize.kmeans.block import Codes

__all__ = ["directions", "entry_directions", "with_lengths"]


def directions(points: Tensor) -> Tensor:
    """Points scaled to norm 1: float32; a zero stays as it is."""
    return torch.nn.functional.normalize(points.double(), dim=-1, eps=1e-300).float()


def entry_directions(entries: Tensor) -> Tensor:
    """Entries scaled to norm 1; a zero, which has no direction, farther off than any of these."""
    found = directions(entries)
    found[..., 0] = torch.where(found.abs().amax(-1) > 0, found[..., 0], 4.0)
    return found


def with_lengths(points: Tensor, weights: Tensor | None, found: Tensor, codes: Codes) -> Tensor:
    """Directions `found: [sets, entries, length]` at the length of least squared error.

    That is the weighted mean of its points' projections on it. One that this would turn round or
    make vanish, and one without points, keeps its direction with a thousandth of the longest
    point's length.
    """
    sets, entries, _ = found.shape
    flat = (codes + np.arange(sets)[:, None] * entries).ravel()
    chosen = found[torch.arange(sets)[:, None], torch.from_numpy(codes)].double()
    along = (points.double() * chosen).sum(-1)
    mass = torch.ones_like(along) if weights is None else weights.double()
    total = np.bincount(flat, (along * mass).numpy().ravel(), minlength=sets * entries)
    seen = np.bincount(flat, mass.numpy().ravel(), minlength=sets * entries)
    lengths = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    lengths = lengths.reshape(sets, entries, 1)
    least = points.double().square().sum(-1).amax(-1).sqrt().numpy()[:, None, None] / 1000
    return found * torch.from_numpy(np.maximum(lengths, least)).float()
