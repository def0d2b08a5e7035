"""Residual quantization: each stage codes what the stages before it left.

Codebooks are trained one after the other on residuals (Chen, Guan and Wang 2010, "Approximate
nearest neighbor search by residual vector quantization"), then together: vectors are coded by
beam search and all codebooks solved for, in turns, as in additive quantization (Babenko and
Lempitsky 2014). At last each stage is rounded as it is stored and the later ones are solved for
anew, so they also code what rounding lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from vqkernels.quantize import beam, vq
from vqkernels.quantize.codebook import Stage, store
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.refit import decode, refit, revive
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit", "fit_vectors"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The stages of `spec`, coded by beam search over all of them."""
    return fit_vectors(target.vectors(spec), spec, recipe, seed=seed)


def fit_vectors(vectors: Vectors, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The same for vectors of any matrix, or of several."""
    if len(spec.stages) == 1:
        return [vq.fit_stage(vectors, spec, recipe, 0, seed=seed)]
    stages = _stagewise(vectors, spec, recipe, seed)
    if recipe.refits and _is_least_squares(spec, recipe):
        books, codes = _together(vectors, [stage.entries for stage in stages], recipe)
        stages = _stored(vectors, books, codes, spec, recipe)
    if recipe.beam == 1 and not recipe.refits:
        return stages
    found = _codes(vectors, [stage.entries for stage in stages], recipe)
    return [
        dataclasses.replace(stage, codes=code) for stage, code in zip(stages, found, strict=True)
    ]


def _is_least_squares(spec: CodebookSpec, recipe: Recipe) -> bool:
    """Whether the entries that were asked for are those that a refit finds."""
    named = recipe.clustering in ("medians", "medoids")
    return spec.distance == "l2" and not named and recipe.norm_limit == 0


def _stagewise(vectors: Vectors, spec: CodebookSpec, recipe: Recipe, seed: int) -> list[Stage]:
    """Each stage trained on what the stored entries before it leave, coded greedily.

    Residuals of the nearest entry alone: with those of all a beam's candidates, codebooks are 3 %
    worse on trained weights at any beam, and training takes that many times as long.
    """
    stages = list[Stage]()
    for stage in range(len(spec.stages)):
        stages.append(vq.fit_stage(vectors, spec, recipe, stage, seed=seed))
        vectors = vectors.minus(stages[-1].decode())
    return stages


def _together(
    vectors: Vectors, books: list[Tensor], recipe: Recipe
) -> tuple[list[Tensor], list[Tensor]]:
    """Codebooks after `recipe.refits` rounds of codes and least squares, and the last codes."""
    codes: list[Tensor] = []
    for _ in range(recipe.refits):
        codes = _codes(vectors, books, recipe)
        books = _solved(vectors, codes, books)
    return books, codes


def _stored(
    vectors: Vectors,
    books: list[Tensor],
    codes: list[Tensor],
    spec: CodebookSpec,
    recipe: Recipe,
) -> list[Stage]:
    """The codebooks rounded one after the other, each later one solved for what that left."""
    stages, done = list[Stage](), list[Tensor]()
    for stage in range(len(books)):
        others = [*done, *books[stage + 1 :]]
        kept = [*codes[:stage], *codes[stage + 1 :]]
        alone = vectors.minus(decode(kept, others))
        factor = spec.coefficient(stage)
        stages.append(store(alone, books[stage], spec.codebook_dtype, coefficient=factor))
        done.append(stages[-1].entries)
        if stage + 1 == len(books):
            break
        # twice: what rounding lost may need codes that the exact entries left unused
        for turn in range(2):
            if turn:
                codes = _codes(vectors, [*done, *books[stage + 1 :]], recipe)
            left = vectors.minus(decode(codes[: stage + 1], done))
            books[stage + 1 :] = _solved(left, codes[stage + 1 :], books[stage + 1 :])
    return stages


def _codes(vectors: Vectors, books: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    return beam.encode(vectors.points, books, weights=vectors.weights, beam=recipe.beam)


def _solved(vectors: Vectors, codes: list[Tensor], books: list[Tensor]) -> list[Tensor]:
    """The codebooks of least error for `codes`, unused entries put to use."""
    solved = refit(vectors.points, codes, books, weights=vectors.weights)
    return revive(vectors.points, codes, solved, weights=vectors.weights)
