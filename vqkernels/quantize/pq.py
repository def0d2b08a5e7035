"""Product quantization: a codebook for each of the subspaces that consecutive vectors go through.

Jégou, Douze and Schmid 2011 ("Product quantization for nearest neighbor search"). Subspaces share
nothing, and `layout.split` hands each of them over as a book of its own: PQ is VQ in every book,
or RQ where the spec has several stages.
"""

from __future__ import annotations

from vqkernels.quantize import rq
from vqkernels.quantize.codebook import Stage
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The stages of `spec`, each with a codebook for each subspace of each group."""
    return rq.fit(target, spec, recipe, seed=seed)
