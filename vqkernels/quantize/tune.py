"""Codebooks and codes learned together, by gradients of the error that counts.

What is coded is a copy of the weight that learns too. It gets the error's gradient straight through
its codes, as the encoder of a VQ-VAE does (van den Oord et al. 2017), while the entries get their
own; so codes change where that helps the layer's output, not only where an entry is nearer. The
commitment loss keeps the copy near its codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.parts import codebook_sets
from vqkernels.quantize import beam
from vqkernels.quantize.codebook import Stage, rounded
from vqkernels.quantize.layout import join, split
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import decode_main
from vqkernels.threads import one_thread

__all__ = ["error", "tune", "tuned"]


def tuned(
    target: Target, spec: CodebookSpec, recipe: Recipe, stages: Sequence[Stage]
) -> list[Stage]:
    """`stages` after `tune`, as they are stored; unchanged where that doesn't lower the error."""
    entries, codes = [stage.entries for stage in stages], [stage.codes for stage in stages]
    found = list[Stage]()
    for stage, book, code in zip(stages, *tune(target, spec, entries, codes, recipe), strict=True):
        values, scale = rounded(book, spec.codebook_dtype, coefficient=stage.coefficient)
        found.append(dataclasses.replace(stage, values=values, scale=scale, codes=code))
    before, after = (_lost(target, spec, some) for some in (stages, found))
    return found if after < before else list(stages)


@one_thread()
def tune(
    target: Target,
    spec: CodebookSpec,
    entries: Sequence[Tensor],
    codes: Sequence[Tensor],
    recipe: Recipe,
) -> tuple[list[Tensor], list[Tensor]]:
    """Entries and codes after `recipe.tune` steps, or the best on the way: never a larger error.

    entries: `[books, entries, size]` float32 of each stage, as they decode. codes: `[books, count]`
        of each stage.
    """
    spec = plain(spec)
    books = [book.clone().requires_grad_() for book in entries]
    # halfway to what the codes stand for: from the weight itself, its nearest codes would be the
    # first step's, and what propagated codes had gained would be lost at once
    start = _decode(spec, target.matrix, entries, codes)
    latent = ((start + target.matrix) / 2).requires_grad_()
    adam = torch.optim.Adam(
        [{"params": [value], "lr": recipe.rate * _size(value)} for value in (*books, latent)]
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=max(1, recipe.tune))
    best, lowest = (list(entries), list(codes)), float("inf")
    found = list(codes)
    for step in range(recipe.tune + 1):
        decoded = _decode(spec, target.matrix, books, found)
        lost = float(error(target, decoded.detach() - target.matrix))
        if lost < lowest:
            best, lowest = ([book.detach().clone() for book in books], found), lost
        if step == recipe.tune:
            break
        through = decoded + latent - latent.detach()
        drawn = recipe.commitment * (latent - decoded.detach()).square()
        if target.weights is not None:
            drawn = drawn * target.weights
        adam.zero_grad()
        # torch has no type for `backward`
        (error(target, through - target.matrix) + drawn.sum()).backward()  # type: ignore[no-untyped-call]
        adam.step()
        rate.step()
        vectors = split(spec, latent.detach(), target.weights)
        plain_books = [book.detach() for book in books]
        found = beam.encode(vectors.points, plain_books, weights=vectors.weights, beam=recipe.beam)
    return best


def _lost(target: Target, spec: CodebookSpec, stages: Sequence[Stage]) -> float:
    books, codes = [stage.entries for stage in stages], [stage.codes for stage in stages]
    with one_thread():
        decoded = _decode(plain(spec), target.matrix, books, codes)
        return float(error(target, decoded - target.matrix))


def error(target: Target, difference: Tensor) -> Tensor:
    """The error that counts of `difference: [n, main]`, a number: see Target."""
    if target.hessian is None:
        squares = difference.square()
        return (squares if target.weights is None else squares * target.weights).sum()
    rows = ((difference @ target.hessian) * difference).sum(1)
    return (rows if target.rows is None else rows * target.rows).sum()


def plain(spec: CodebookSpec) -> CodebookSpec:
    """The main columns of `spec` alone, with entries as they decode."""
    return dataclasses.replace(
        spec,
        codebook_dtype="float32",
        coefficients=(),
        outlier_columns=0,
        outlier_entries=0,
        outlier_vector_length=0,
        uniform_columns=0,
    )


def _decode(
    spec: CodebookSpec, like: Tensor, books: Sequence[Tensor], codes: Sequence[Tensor]
) -> Tensor:
    """`[n, main]` of `codes`, with gradients for the entries."""
    n, k = like.shape
    cells = split(spec, like, None).cells
    shape = (codebook_sets(spec, n, k), spec.subspaces)
    parts = {
        f"codebook_{number}": book.reshape(*shape, *book.shape[1:])
        for number, book in enumerate(books)
    }
    parts["codes"] = join(spec, n, k, cells, list(codes))
    return decode_main(spec, n, k, parts, torch.float32)


def _size(value: Tensor) -> float:
    """Root mean square, or 1 of zeros."""
    return float(value.detach().double().square().mean().sqrt()) or 1.0
