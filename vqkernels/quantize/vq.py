"""Vector quantization: each vector is one entry of a codebook found by clustering.

Lloyd 1957 (published 1982); Linde, Buzo and Gray 1980. `recipe.clustering` names other ways.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from vqkernels.quantize import sampling
from vqkernels.quantize.codebook import Stage, store
from vqkernels.quantize.kmeans import assign, cluster
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit", "fit_stage", "training_vectors"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The one stage of `spec`, with codes of all vectors."""
    vectors = target.vectors(spec)
    some = training_vectors(target, vectors, spec, recipe, seed)
    stage = fit_stage(some, spec, recipe, 0, seed=seed)
    if some is not vectors:
        stage = dataclasses.replace(stage, codes=_codes(vectors, stage, spec))
    return [stage]


def training_vectors(
    target: Target, vectors: Vectors, spec: CodebookSpec, recipe: Recipe, seed: int
) -> Vectors:
    """What codebooks are trained on: a sample where the recipe asks for one, else all `vectors`."""
    n, main = target.matrix.shape
    size = recipe.sample
    return sampling.sample(vectors, spec, n, main + spec.side_columns, size, seed=seed)


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
    return dataclasses.replace(stored, codes=_codes(vectors, stored, spec))


def _codes(vectors: Vectors, stage: Stage, spec: CodebookSpec) -> Tensor:
    return assign(vectors.points, stage.entries, weights=vectors.weights, distance=spec.distance)
