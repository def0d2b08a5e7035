"""Codes for codebooks that are there already: of another tensor, or shared by several layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.parts import part_table
from vqkernels.quantize import beam, propagate
from vqkernels.quantize.codebook import rounded
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import scaled_codebook

__all__ = ["codebook_parts", "find_codes"]


def codebook_parts(
    codebooks: Sequence[Tensor], spec: CodebookSpec, n: int, k: int
) -> dict[str, Tensor]:
    """Entries of each stage, `[sets, subspaces, entries, vector_size]`, as the format stores them.

    Raises TensorError unless there is one for each stage, finite and of the layer's shape.
    """
    if len(codebooks) != len(spec.stages):
        raise TensorError(
            f"codebooks: {len(codebooks)} given, but the format has {len(spec.stages)} stages"
        )
    table, parts, scales = part_table(spec, n, k), dict[str, Tensor](), list[Tensor]()
    for stage, entries in enumerate(codebooks):
        part = table[f"codebook_{stage}"]
        if tuple(entries.shape) != part.shape:
            raise TensorError(
                f"codebooks: stage {stage} is {list(entries.shape)}, but the format of this "
                f"{n} x {k} layer needs {list(part.shape)}"
            )
        book = entries.detach().cpu().float()
        if not bool(torch.isfinite(book).all()):
            raise TensorError(f"codebooks: stage {stage} holds NaN or infinity; train it again")
        values, scale = rounded(
            book.flatten(0, 1), spec.codebook_dtype, coefficient=spec.coefficient(stage)
        )
        parts[f"codebook_{stage}"] = values.reshape(part.shape)
        if scale is not None:
            scales.append(scale)
    if scales:
        parts["codebook_scale"] = torch.stack(scales, dim=-1).reshape(table["codebook_scale"].shape)
    return parts


def find_codes(
    target: Target, spec: CodebookSpec, parts: Mapping[str, Tensor], recipe: Recipe
) -> list[Tensor]:
    """Codes `[books, count]` of each stage for the codebooks among `parts`."""
    vectors = target.vectors(spec)
    books = [
        scaled_codebook(spec, parts, stage, torch.float32).flatten(0, 1)
        for stage in range(len(spec.stages))
    ]
    if spec.distance == "l2" and target.hessian is not None and recipe.propagate:
        return propagate.encode(target, spec, books, recipe)
    if spec.distance == "l2":
        return beam.encode(vectors.points, books, weights=vectors.weights, beam=recipe.beam)
    codes = list[Tensor]()
    for book in books:
        found = assign(vectors.points, book, weights=vectors.weights, distance=spec.distance)
        codes.append(found)
        vectors = vectors.minus(book[torch.arange(len(book))[:, None], found])
    return codes
