"""A matrix as the vectors of each codebook, and codes of those vectors as the code grid.

A book is one codebook of each stage: number `set * subspaces + subspace`, as `set_index` has it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vqkernels.parts import code_grid, codebook_sets
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import set_index

__all__ = ["Vectors", "block", "join", "members", "split"]


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The vectors of each book, filled up with weightless ones to the same count.

    points: `[books, count, length]` float32.
    weights: of their squared errors: None (all 1), `[books, count]`, or
        `[books, count, length]` where they differ inside a vector.
    cells: `[books, count]`, index into the flat code grid; -1 for filling.
    """

    points: Tensor
    weights: Tensor | None
    cells: Tensor

    def minus(self, decoded: Tensor) -> Vectors:
        """The residual vectors after `decoded: [books, count, length]`."""
        return dataclasses.replace(self, points=self.points - decoded)


def block(spec: CodebookSpec, matrix: Tensor) -> Tensor:
    """A matrix as cells `[rows, columns, vector_size]`, zeros where it ends inside a vector.

    The inverse of `tensor.unblock`.
    """
    n, k = matrix.shape
    width, length, stride = spec.vector_width, spec.vector_length, spec.stride
    size = length * stride
    if spec.vector_axis == "in":
        padded = torch.nn.functional.pad(matrix, (0, -k % size, 0, -n % width))
        rows = len(padded) // width
        cells = padded.reshape(rows, width, -1, length, stride).permute(0, 2, 4, 1, 3)
        return cells.reshape(rows, -1, width * length)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -n % size))
    return padded.reshape(-1, length, stride, k).permute(0, 2, 3, 1).reshape(-1, k, length)


def split(spec: CodebookSpec, matrix: Tensor, weights: Tensor | None) -> Vectors:
    """The vectors of the main columns, `matrix: [n, main]` float32; `weights: [n, main]` or None.

    Padding gets weight 0.
    """
    n, k = len(matrix), matrix.shape[1] + spec.side_columns
    cells = block(spec, matrix)
    rows, columns, length = cells.shape
    points = cells.reshape(-1, length)
    if weights is None and cells.numel() != matrix.numel():
        weights = torch.ones_like(matrix)
    each = None if weights is None else block(spec, weights).reshape(-1, length)
    which = set_index(spec, n, k).expand(rows, columns).reshape(-1)
    index = members(which, codebook_sets(spec, n, k) * spec.subspaces)
    points = points[index.clamp(min=0)]
    if bool((index < 0).any()):
        filling = (index < 0)[..., None]
        points = points.masked_fill(filling, 0)
        each = torch.ones(rows * columns, length) if each is None else each
        each = each[index.clamp(min=0)].masked_fill(filling, 0)
    elif each is not None:
        each = each[index]
    if each is not None and bool((each == each[..., :1]).all()):
        each = each[..., 0].contiguous()
    return Vectors(points, each, index)


def members(which: Tensor, books: int) -> Tensor:
    """Cells of each book in their order: `[books, count]`, filled up with -1."""
    counts = torch.bincount(which, minlength=books)
    order = which.argsort(stable=True)
    count = int(counts.max())
    if int(counts.min()) == count:
        return order.reshape(books, count)
    place = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which[order]]
    members = torch.full((books, count), -1)
    members[which[order], place] = order
    return members


def join(spec: CodebookSpec, n: int, k: int, cells: Tensor, codes: list[Tensor]) -> Tensor:
    """The code grid `[rows, columns, stages]` of each stage's `codes: [books, count]`."""
    grid = torch.empty(math.prod(code_grid(spec, n, k)), len(codes), dtype=torch.int64)
    grid[cells[cells >= 0]] = torch.stack(codes, dim=-1)[cells >= 0]
    dtype = torch.uint8 if spec.max_entries <= 256 else torch.uint16
    return grid.to(dtype).reshape(*code_grid(spec, n, k), len(codes))
