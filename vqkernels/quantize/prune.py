"""Fewer entries in a tensor that is there: rarely used ones go, near-equal ones become one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.kmeans.merging import near_equal
from vqkernels.quantize.layout import Vectors, join, split
from vqkernels.quantize.prepare import target_of
from vqkernels.quantize.target import Target
from vqkernels.spec import min_bits
from vqkernels.tensor import QuantizedTensor, scaled_codebook
from vqkernels.threads import workers

__all__ = ["prune"]


def prune(
    tensor: QuantizedTensor, *, rare: int = 1, merge: float = 0.0, weight: Tensor | None = None
) -> QuantizedTensor:
    """`tensor` without entries that fewer than `rare` vectors use, on the CPU.

    merge: entries nearer than so many times the root mean square norm of what their codebook
        decodes to become the one of them that is used most; 0: none do.
    weight: `[n, k]`, what was quantised; vectors whose entry goes are coded anew to come near it,
        and without it to come near what they decode to now.

    A stage has one number of entries, the most that any of its codebooks keeps: another keeps the
    most used of what would go. Codes of a stage that shrinks take the fewest bits. Raises
    TensorError for a limit below 0 and a weight that doesn't fit.
    """
    if rare < 0 or not merge >= 0:
        raise TensorError(f"prune: rare {rare}, merge {merge}; use numbers that aren't below 0")
    tensor = tensor.to("cpu")
    tensor.validate()
    spec, parts = tensor.spec, dict(tensor.parts)
    goal = _goal(tensor, weight)
    grid = parts["codes"].long().reshape(-1, len(spec.stages))
    codes = list(grid[goal.cells.clamp(min=0)].unbind(-1))
    books = [
        scaled_codebook(spec, parts, stage, torch.float32).flatten(0, 1)
        for stage in range(len(spec.stages))
    ]
    missed = goal
    for book, code in zip(books, codes, strict=True):
        missed = missed.minus(_chosen(book, code))
    bits = list(spec.code_bits)
    for stage, book in enumerate(books):
        kept = _kept(book, _uses(goal, codes[stage], book.shape[1]), rare, merge)
        if kept.shape[1] == book.shape[1]:
            continue
        # a stage is to make up for what all of them miss now, and for itself
        wanted = missed.minus(-_chosen(book, codes[stage]))
        books[stage] = _chosen(book, kept)
        codes[stage] = _recoded(codes[stage], kept, book.shape[1], wanted, books[stage])
        missed = wanted.minus(_chosen(books[stage], codes[stage]))
        stored = parts[f"codebook_{stage}"]
        left = _chosen(stored.flatten(0, 1), kept)
        parts[f"codebook_{stage}"] = left.reshape(*stored.shape[:2], *left.shape[1:])
        bits[stage] = min_bits(kept.shape[1])
    stages = tuple(book.shape[1] for book in books)
    spec = dataclasses.replace(spec, stages=stages, code_bits=tuple(bits))
    parts["codes"] = join(spec, tensor.n, tensor.k, goal.cells, codes)
    return QuantizedTensor(spec, tensor.n, tensor.k, parts)


def _goal(tensor: QuantizedTensor, weight: Tensor | None) -> Vectors:
    """What the vectors are to come near, in the terms of the codebooks."""
    if weight is None:
        return split(tensor.spec, tensor.main_rows(torch.float32), None)
    matrix = weight.detach().cpu().float()
    if tuple(matrix.shape) != (tensor.n, tensor.k) or not bool(torch.isfinite(matrix).all()):
        raise TensorError(
            f"prune: weight {list(matrix.shape)} for a tensor of {tensor.n} x {tensor.k}; give the "
            f"finite matrix that was quantised"
        )
    return target_of(tensor, Target(matrix))[0].vectors(tensor.spec)


def _chosen(books: Tensor, codes: Tensor) -> Tensor:
    """Entries `[books, count, length]` that `codes: [books, count]` name."""
    return books[torch.arange(len(books))[:, None], codes]


def _uses(goal: Vectors, codes: Tensor, entries: int) -> Tensor:
    """How many vectors use each entry: `[books, entries]`."""
    uses = torch.zeros(len(codes), entries, dtype=torch.int64)
    return uses.scatter_add_(1, codes, (goal.cells >= 0).long())


def _kept(books: Tensor, uses: Tensor, rare: int, merge: float) -> Tensor:
    """Which entries stay, rising: `[books, kept]`, as many in each book."""
    order = uses.argsort(dim=1, descending=True, stable=True)
    stays = uses.gather(1, order) >= rare
    if merge:
        shares = uses.double() / uses.sum(1, keepdim=True)
        with workers():  # for torch's one thread: another rounding might merge others
            norms = (books.double().square().sum(-1) * shares).sum(1).sqrt()
            stays &= ~torch.from_numpy(near_equal(_chosen(books, order), merge * norms))
    count = max(1, int(stays.sum(1).max()))
    # those that stay come first, and then as they are used
    first = (~stays).long().argsort(dim=1, stable=True)[:, :count]
    return order.gather(1, first).sort(dim=1).values


def _recoded(codes: Tensor, kept: Tensor, entries: int, wanted: Vectors, left: Tensor) -> Tensor:
    """Codes among the entries that are `left`: the same entry, or the nearest where it is gone."""
    number = torch.full((len(codes), entries), -1)
    number.scatter_(1, kept, torch.arange(kept.shape[1]).expand_as(kept))
    renamed = number.gather(1, codes)
    nearest = assign(wanted.points, left, weights=wanted.weights)
    return torch.where(renamed < 0, nearest, renamed)
