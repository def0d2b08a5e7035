"""Vector quantization: each vector is one entry of a codebook found by k-means.

Lloyd 1957 (published 1982); Linde, Buzo and Gray 1980.
"""

from __future__ import annotations

from vqkernels.quantize.codebook import Stage, store
from vqkernels.quantize.kmeans import kmeans
from vqkernels.quantize.layout import Vectors
from vqkernels.spec import CodebookSpec

__all__ = ["fit", "fit_stage"]


def fit(vectors: Vectors, spec: CodebookSpec, *, seed: int, iterations: int) -> list[Stage]:
    """The one stage of `spec`, a codebook for each book of `vectors`."""
    return [fit_stage(vectors, spec, 0, seed=seed, iterations=iterations)]


def fit_stage(
    vectors: Vectors, spec: CodebookSpec, stage: int, *, seed: int, iterations: int
) -> Stage:
    """Stage number `stage` of `spec`, for `vectors` that earlier stages have been taken from."""
    found = kmeans(
        vectors.points,
        spec.stages[stage],
        weights=vectors.weights,
        seed=(seed, stage),
        iterations=iterations,
    )
    return store(vectors, found.centroids, spec.codebook_dtype)
