"""Residual quantization: each stage is VQ of what the stages before it left.

Greedy, as in Chen, Guan and Wang 2010 ("Approximate nearest neighbor search by residual vector
quantization"). The residual is taken from the stored entries, so a later stage also codes what
rounding the earlier codebook lost.
"""

from __future__ import annotations

from vqkernels.quantize import vq
from vqkernels.quantize.codebook import Stage
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The stages of `spec`, each of what the stages before it left."""
    vectors, stages = target.vectors(spec), list[Stage]()
    for stage in range(len(spec.stages)):
        stages.append(vq.fit_stage(vectors, spec, recipe, stage, seed=seed))
        vectors = vectors.minus(stages[-1].decode())
    return stages
