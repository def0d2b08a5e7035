"""The clusterings of this package behind one call."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.quantize.kmeans import limits, lloyd, minibatch, seeding, spherical
from vqkernels.quantize.kmeans.block import Block
from vqkernels.quantize.kmeans.coding import Distance, codes_of, point_errors
from vqkernels.quantize.kmeans.given import Given
from vqkernels.quantize.kmeans.learning import learn
from vqkernels.quantize.kmeans.medians import median_rule
from vqkernels.quantize.kmeans.medoids import medoid_numbers, medoid_rule
from vqkernels.quantize.recipe import Recipe
from vqkernels.threads import workers

__all__ = ["KMeans", "cluster", "kmeans"]

_DEFAULT = Recipe()
_Seed = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KMeans:
    """Result: `centroids: [..., entries, length]` float32, `codes: [..., count]` int64.

    distortion: weighted sum of squared errors, over all sets.
    """

    centroids: Tensor
    codes: Tensor
    distortion: float


def kmeans(
    points: Tensor,
    entries: int,
    *,
    weights: Tensor | None = None,
    seed: _Seed = 0,
    iterations: int = 25,
) -> KMeans:
    """Centroids of `points: [count, length]`, or of each set of `[sets, count, length]`.

    weights: `[..., count]` or `[..., count, length]`, none below 0.
    seed: what the first centroids are drawn with.

    A code that no point uses is put on the farthest point of the cluster with the largest error.
    Codes stay unused only where there are fewer distinct points than entries. Raises TensorError
    for shapes that don't fit, NaN, negative weights or no points.
    """
    given = Given.of(points, weights)
    found = _train(given, entries, _DEFAULT, iterations, seed)
    return _result(given, found, "l2", points.shape)


def cluster(
    points: Tensor,
    entries: int,
    *,
    weights: Tensor | None = None,
    recipe: Recipe = _DEFAULT,
    distance: Distance = "l2",
    seed: _Seed = 0,
) -> KMeans:
    """`kmeans` by `recipe`: its clustering, init, iterations, batch, norm_limit and merge.

    distance: `cosine` gives each point the entry with the largest cosine, and each entry the
        direction of its points with the length that leaves them the least squared error.

    Codes are what `assign` finds, whatever the entries were trained by. Raises UnsupportedError for
    a recipe that contradicts itself or the distance, and as `kmeans` does.
    """
    given = Given.of(points, weights)
    _check_combination(recipe, distance)
    if distance == "cosine":
        found = _spherical(given, entries, recipe, seed)
    elif recipe.clustering in ("ema", "gradient"):
        found = _learn(given, entries, recipe, seed)
    else:
        found = _train(given, entries, recipe, recipe.iterations, seed)
    return _result(given, found, distance, points.shape)


def _check_combination(recipe: Recipe, distance: Distance) -> None:
    clustering = recipe.clustering
    if distance == "cosine" and clustering not in ("lloyd", "minibatch"):
        raise UnsupportedError(
            f"k-means: clustering {clustering!r} has no distance 'cosine'; use 'lloyd' or "
            f"'minibatch' for it"
        )
    if clustering == "medoids" and recipe.norm_limit:
        raise UnsupportedError(
            "k-means: norm_limit would move the entries of clustering 'medoids' off the vectors "
            "that they are; use one of the two"
        )
    if clustering in ("ema", "gradient") and recipe.merge:
        raise UnsupportedError(
            f"k-means: clustering {clustering!r} merges no entries; leave merge at 0, expiry moves "
            f"what is hardly used"
        )


def _train(
    given: Given,
    entries: int,
    recipe: Recipe,
    iterations: int,
    seed: _Seed,
    *,
    sphere: bool = False,
) -> Tensor:
    """Entries `[sets, entries, length]` by a clustering of this package."""
    draws, parts = np.random.default_rng(seed), list[Tensor]()
    with workers() as pool:
        for _, some in given.parts():
            block = Block.of(some.points, some.weights, pool)
            rule = _rule(block, some, recipe, sphere=sphere)
            found = _first(block, entries, recipe, draws)
            if recipe.clustering == "minibatch":
                found = minibatch.passes(block, rule, found, iterations, recipe.batch, draws)
            else:
                found = lloyd.iterate(block, rule, found, iterations)
            if recipe.clustering == "medoids":
                found = lloyd.iterate(block, medoid_rule(block), found, iterations)
                # the very vectors, not what shift and scale left of them
                index = medoid_numbers(block, found)
                parts.append(some.points[torch.arange(len(index))[:, None], index])
            else:
                parts.append(block.restore(found))
    return torch.cat(parts)


def _first(block: Block, entries: int, recipe: Recipe, draws: np.random.Generator) -> Tensor:
    if entries < 1:
        raise TensorError(f"k-means: {entries} entries; ask for 1 at least")
    find = seeding.plus_plus if recipe.init == "kmeans++" else seeding.random_points
    return find(block, entries, draws)


def _rule(block: Block, given: Given, recipe: Recipe, *, sphere: bool) -> lloyd.Rule:
    """Of the recipe's clustering; for medoids, of the k-means that comes before them."""
    rule = median_rule(block) if recipe.clustering == "medians" else lloyd.mean_rule(block)
    norms = limits.rms_norms(given.points, given.weights)
    if recipe.merge:
        rule = limits.merging(block, rule, recipe.merge * norms)
    if sphere:
        return limits.on_sphere(block, rule)
    return limits.limited(block, rule, recipe.norm_limit * norms) if recipe.norm_limit else rule


def _learn(given: Given, entries: int, recipe: Recipe, seed: _Seed) -> Tensor:
    """Entries by gradient, from the same first ones."""
    draws = np.random.default_rng(seed)
    with workers() as pool:
        blocks = (Block.of(some.points, some.weights, pool) for _, some in given.parts())
        first = [block.restore(_first(block, entries, recipe, draws)) for block in blocks]
    found = learn(given.points, torch.cat(first), weights=given.weights, recipe=recipe, seed=seed)
    if not recipe.norm_limit:
        return found
    return limits.shortened(
        found, recipe.norm_limit * limits.rms_norms(given.points, given.weights)
    )


def _spherical(given: Given, entries: int, recipe: Recipe, seed: _Seed) -> Tensor:
    """Entries by spherical k-means, with the lengths that serve their points best."""
    given.check_directions()
    points, weights = given.points, given.weights
    # a zero has no direction to learn from
    seen = (points != 0).any(-1).float()
    directed = Given(spherical.directions(points), seen if weights is None else seen * weights)
    found = _train(directed, entries, recipe, recipe.iterations, seed, sphere=True)
    codes = codes_of(given, found, "cosine").numpy()
    found = spherical.with_lengths(points, weights, found, codes)
    if not recipe.norm_limit:
        return found
    return limits.shortened(found, recipe.norm_limit * limits.rms_norms(points, weights))


def _result(given: Given, found: Tensor, distance: Distance, shape: torch.Size) -> KMeans:
    codes = codes_of(given, found, distance)
    distortion = 0.0
    with workers():  # for torch's one thread
        for part, some in given.parts():
            errors = point_errors(some.points, found[part], codes[part], some.weights)
            distortion += float(errors.sum(dtype=torch.float64))
    sets = shape[:-2]
    return KMeans(found.reshape(*sets, *found.shape[1:]), codes.reshape(shape[:-1]), distortion)
