"""VPTQ: k-means weighted by the Hessian's diagonal, a residual codebook, propagated errors.

Liu et al. 2024 ("VPTQ: Extreme low-bit vector post-training quantization for large language
models"): a main codebook of the vectors, a residual codebook of what it leaves, both weighted by
the diagonal; then codes column by column, where a full Hessian says how later columns make up for
the errors of earlier ones. Outlier columns have a codebook of their own.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.quantize import rq, vq
from vqkernels.quantize.codebook import Stage
from vqkernels.quantize.layout import join, split
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.refine import refine
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit", "outlier_codebook"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The stages of `spec`: main first; vectors of any axis, stride, groups and subspaces."""
    if target.hessian is None or not recipe.propagate:
        return rq.fit(target, spec, recipe, seed=seed)
    return refine(target, spec, recipe, _trained(target, spec, recipe, seed))


def _trained(target: Target, spec: CodebookSpec, recipe: Recipe, seed: int) -> list[Stage]:
    """The stages' codebooks, each of what those before it leave; codes of the sample alone."""
    vectors = vq.training_vectors(target, target.vectors(spec), spec, recipe, seed)
    stages = list[Stage]()
    for stage in range(len(spec.stages)):
        stages.append(vq.fit_stage(vectors, spec, recipe, stage, seed=seed))
        vectors = vectors.minus(stages[-1].decode())
    return stages


def outlier_codebook(
    columns: Tensor,
    spec: CodebookSpec,
    recipe: Recipe,
    *,
    weights: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Codes and codebook, as stored, of the outlier columns `[n, count]`.

    weights: of squared errors, `[n, count]` or None.
    Codes are `[ceil(n / outlier_vector_length), count]`, the codebook `[outlier_entries,
    outlier_vector_length]`. Raises UnsupportedError where `side_dtype` can't hold an entry.
    """
    own = CodebookSpec(
        stages=(spec.outlier_entries,),
        vector_length=spec.outlier_vector_length,
        vector_axis="out",
        codebook_dtype=spec.side_dtype,
    )
    vectors = split(own, columns.float(), weights)
    stage = vq.fit_stage(vectors, own, recipe, 0, seed=seed)
    n, count = columns.shape
    codes = join(own, n, count, vectors.cells, [stage.codes])
    return codes[..., 0], stage.values[0]
