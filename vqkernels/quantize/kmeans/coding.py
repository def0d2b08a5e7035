"""Codes of points for entries that are there, and what they cost."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.quantize.kmeans import spherical
from vqkernels.quantize.kmeans.block import Block
from vqkernels.quantize.kmeans.given import Given
from vqkernels.threads import workers

__all__ = ["Distance", "assign", "codes_of", "point_errors"]

Distance = Literal["l2", "cosine"]


def assign(
    points: Tensor,
    centroids: Tensor,
    *,
    weights: Tensor | None = None,
    distance: Distance = "l2",
) -> Tensor:
    """The nearest centroid of each point: codes `[..., count]`, int64; the lowest where equal.

    Shapes and errors as for `kmeans`; `centroids: [..., entries, length]`. One weight a point
    changes nothing here. distance: `cosine` is the largest cosine; a zero point, which has none
    with anything, gets the shortest entry.
    """
    given = Given.of(points, weights)
    books = centroids.detach().cpu().float().reshape(-1, *centroids.shape[-2:])
    if len(books) != len(given.points) or books.shape[-1] != given.points.shape[-1]:
        raise TensorError(
            f"assign: centroids {list(centroids.shape)} don't fit points {list(points.shape)}; "
            f"give [entries, {points.shape[-1]}] for each set"
        )
    return codes_of(given, books, distance).reshape(points.shape[:-1])


def codes_of(given: Given, books: Tensor, distance: Distance) -> Tensor:
    """Codes `[sets, count]` of what was given, for `books: [sets, entries, length]`."""
    if distance == "cosine":
        return _by_cosine(given, books)
    codes = list[Tensor]()
    with workers() as pool:
        for part, some in given.parts():
            block = Block.of(some.points, some.weights, pool)
            codes.append(torch.from_numpy(block.nearest(block.enter(books[part]))))
    return torch.cat(codes)


def point_errors(
    points: Tensor, centroids: Tensor, codes: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted squared error of each point: `[sets, count]`, from the differences themselves."""
    which = torch.arange(len(points))[:, None]
    errors = (points - centroids[which, codes]).double().square()
    if weights is None:
        return errors.sum(-1)
    if weights.ndim == 3:
        return (errors * weights).sum(-1)
    return errors.sum(-1) * weights


def _by_cosine(given: Given, books: Tensor) -> Tensor:
    given.check_directions()
    directed = Given(spherical.directions(given.points), given.weights)
    codes = codes_of(directed, spherical.entry_directions(books), "l2")
    shortest = books.double().square().sum(-1).argmin(-1, keepdim=True)
    return torch.where((given.points == 0).all(-1), shortest, codes)
