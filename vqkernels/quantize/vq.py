"""Vector quantization: each vector is one entry of a codebook found by clustering.

Lloyd 1957 (published 1982); Linde, Buzo and Gray 1980. `recipe.clustering` names other ways.
"""

from __future__ import annotations

import dataclasses

from vqkernels.quantize.codebook import Stage, store
from vqkernels.quantize.kmeans import assign, cluster
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit", "fit_stage"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The one stage of `spec`."""
    return [fit_stage(target.vectors(spec), spec, recipe, 0, seed=seed)]


def fit_stage(
    vectors: Vectors, spec: CodebookSpec, recipe: Recipe, stage: int, *, seed: int
) -> Stage:
    """Stage number `stage` of `spec`, for `vectors` that earlier stages have been taken from."""
    found = cluster(
        vectors.points,
        spec.stages[stage],
        weights=vectors.weights,
        recipe=recipe,
        distance=spec.distance,
        seed=(seed, stage),
    )
    factor = spec.coefficient(stage)
    stored = store(vectors, found.centroids, spec.codebook_dtype, coefficient=factor)
    if spec.distance == "l2":
        return stored
    codes = assign(vectors.points, stored.entries, weights=vectors.weights, distance=spec.distance)
    return dataclasses.replace(stored, codes=codes)
