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

import torch
from torch import Tensor

from vqkernels.quantize import beam, vq
from vqkernels.quantize.codebook import Stage, store
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.refit import decode, refit, revive, squared_errors
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["fit", "is_least_squares"]


def fit(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> list[Stage]:
    """The stages of `spec`, coded by beam search over all of them.

    Refits are of squared errors, and of entries that may lie anywhere: none is made for medians,
    for medoids, or where norms are limited. By cosine, stages are trained and coded greedily.
    """
    if len(spec.stages) == 1:
        return vq.fit(target, spec, recipe, seed=seed)
    vectors = target.vectors(spec)
    some = vq.training_vectors(target, vectors, spec, recipe, seed)
    stages = _coded(some, _stagewise(some, spec, recipe, seed), spec, recipe)
    if recipe.refits and is_least_squares(spec, recipe):
        trained = _coded(some, _trained(some, stages, spec, recipe), spec, recipe)
        stages = _of_less_error(some, stages, trained)
    return stages if some is vectors else _coded(vectors, stages, spec, recipe)


def is_least_squares(spec: CodebookSpec, recipe: Recipe) -> bool:
    """Whether the entries that were asked for are those that a refit finds."""
    named = recipe.clustering in ("medians", "medoids")
    return spec.distance == "l2" and not named and recipe.norm_limit == 0


def _coded(
    vectors: Vectors, stages: list[Stage], spec: CodebookSpec, recipe: Recipe
) -> list[Stage]:
    """The stages with codes of `vectors`."""
    if spec.distance == "l2":
        codes = _codes(vectors, [stage.entries for stage in stages], recipe)
    else:
        codes = list[Tensor]()
        for stage in stages:
            codes.append(assign(vectors.points, stage.entries, distance=spec.distance))
            vectors = vectors.minus(decode([codes[-1]], [stage.entries]))
    return [
        dataclasses.replace(stage, codes=code) for stage, code in zip(stages, codes, strict=True)
    ]


def _stagewise(vectors: Vectors, spec: CodebookSpec, recipe: Recipe, seed: int) -> list[Stage]:
    """Each stage trained on what the stored entries before it leave, coded greedily.

    Residuals of the nearest entry alone: with those of all of a beam's 5 candidates, codebooks
    were 2 to 3 % worse before any refit, and training took 4 times as long.
    """
    stages = list[Stage]()
    for stage in range(len(spec.stages)):
        stages.append(vq.fit_stage(vectors, spec, recipe, stage, seed=seed))
        vectors = vectors.minus(stages[-1].decode())
    return stages


def _trained(
    vectors: Vectors, stages: list[Stage], spec: CodebookSpec, recipe: Recipe
) -> list[Stage]:
    """Stages after `recipe.refits` rounds of least squares and codes, then stored."""
    books, codes = [stage.entries for stage in stages], [stage.codes for stage in stages]
    for turn in range(recipe.refits):
        if turn:
            codes = _codes(vectors, books, recipe)
        books = _solved(vectors, codes, books)
    return _stored(vectors, books, codes, spec, recipe)


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


def _of_less_error(vectors: Vectors, first: list[Stage], second: list[Stage]) -> list[Stage]:
    """Of each book the stages that come nearer to the vectors; `first` where both are as near.

    Least squares can lose where a handful of vectors has as many entries: a beam finds other codes.
    """
    errors = []
    for stages in (first, second):
        decoded = decode([stage.codes for stage in stages], [stage.entries for stage in stages])
        each = squared_errors(vectors.points - decoded, vectors.weights)
        # numpy: torch's sum of many elements rounds differently with the number of threads
        errors.append(each.numpy().sum(1))
    worse = torch.from_numpy(errors[1] >= errors[0])
    return [
        Stage(
            torch.where(worse[:, None, None], one.values, other.values),
            _either(worse, one.scale, other.scale),
            torch.where(worse[:, None], one.codes, other.codes),
            other.coefficient,
        )
        for one, other in zip(first, second, strict=True)
    ]


def _either(first: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.where(first, one, other)


def _codes(vectors: Vectors, books: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    return beam.encode(vectors.points, books, weights=vectors.weights, beam=recipe.beam)


def _solved(vectors: Vectors, codes: list[Tensor], books: list[Tensor]) -> list[Tensor]:
    """The codebooks of least error for `codes`, unused entries put to use."""
    solved = refit(vectors.points, codes, books, weights=vectors.weights)
    return revive(vectors.points, codes, solved, weights=vectors.weights)
