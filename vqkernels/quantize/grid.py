"""A target with a full Hessian, laid out as the code grid: every cell a block of rows and columns.

Rows and inputs are put in the order in which cells cover them, so that vectors along `in` or `out`,
wide or strided, are all blocks `[height, span]`: `[vector_width, vector_length]` along `in` and
`[vector_length, 1]` along `out`. A column of cells covers `span` inputs, and no row of the matrix
has two cells in it: given the other columns, its cells are coded independently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqkernels.parts import code_grid
from vqkernels.quantize.layout import members
from vqkernels.quantize.products import product
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import set_index

__all__ = ["Grid", "grid_of"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The rows, inputs and books of a target by cell; `columns` of cells in the order of coding.

    matrix: `[rows * height, inputs]` float64; rows of padding are 0.
    mass: `[rows, height]` float64, factor of each row's error; 0 for padding.
    hessian: `[inputs, inputs]` float64, symmetric.
    edges: `[columns + 1]`: column c covers inputs `edges[c]..edges[c + 1] - 1`; fewer than `span`
        where the matrix ends inside a vector.
    order: `[columns]`, number of each column in the code grid.
    members: `[sets, count]`, rows of cells that share a book in every column; filled up with -1.
    first, row_first: `[sets]` and `[rows]`, number of a set's, and so of a row's, lowest book.
    step: `[columns]`, what column c adds to that number.
    """

    matrix: Tensor
    mass: Tensor
    hessian: Tensor
    edges: tuple[int, ...]
    span: int
    order: Tensor
    members: Tensor
    first: Tensor
    row_first: Tensor
    step: Tensor

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return len(self.mass)

    @property
    def height(self) -> int:
        """Rows of the matrix in a cell."""
        return self.mass.shape[1]

    @property
    def columns(self) -> int:
        """Columns of cells."""
        return len(self.order)

    def inputs(self, column: int) -> slice:
        """The inputs that a column of cells covers."""
        return slice(self.edges[column], self.edges[column + 1])

    def books(self) -> Tensor:
        """Number of the book of each cell: `[rows, columns]`."""
        return self.row_first[:, None] + self.step

    def decode(self, entries: Sequence[Tensor], codes: Tensor) -> Tensor:
        """The matrix that `codes: [rows, columns, stages]` stand for, as `matrix` is laid out.

        entries: `[books, entries, size]` of each stage, as they decode.
        """
        books = self.books()
        decoded = torch.empty_like(self.matrix)
        kept = self._kept()
        step = max(1, (1 << 22) // (self.columns * self.height * self.span))
        for first in range(0, self.rows, step):
            part = slice(first, first + step)
            cells = torch.zeros(1, dtype=torch.float64)
            for stage, book in enumerate(entries):
                cells = cells + book[books[part], codes[part, :, stage]].double()
            patches = cells.reshape(len(cells), self.columns, self.height, self.span)
            flat = patches.transpose(1, 2).reshape(len(cells) * self.height, -1)
            decoded[first * self.height : (first + len(cells)) * self.height] = flat[:, kept]
        return decoded

    def gather(self, matrix: Tensor, codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The sum over each entry's cells of `matrix`: the transpose of `decode`, in float64.

        sizes: entries of each stage. Sums run in the order of cells (numpy.bincount).
        """
        kept = self._kept()
        cells = matrix
        if not bool(kept.all()):
            cells = matrix.new_zeros(len(matrix), len(kept))
            cells[:, kept] = matrix
        shape = (self.rows, self.height, self.columns, self.span)
        coordinates = cells.reshape(shape).permute(1, 3, 0, 2).reshape(-1, self.rows * self.columns)
        books = self.books()
        total = int(self.first.max() + self.step.max()) + 1
        found = []
        for stage, entries in enumerate(sizes):
            flat = (books * entries + codes[..., stage]).reshape(-1).numpy()
            sums = [
                np.bincount(flat, values.numpy(), minlength=total * entries)
                for values in coordinates
            ]
            found.append(torch.from_numpy(np.stack(sums, axis=-1)).reshape(total, entries, -1))
        return found

    def _kept(self) -> Tensor:
        """Which of the `columns * span` inputs of whole cells are in the matrix."""
        widths = torch.tensor(self.edges).diff()
        return (torch.arange(self.span) < widths[:, None]).reshape(-1)

    def to_books(self, codes: Tensor, cells: Tensor) -> list[Tensor]:
        """Codes by column, `[rows, columns, stages]`, as each stage's codes of `cells`.

        cells: `[books, count]`, as in Vectors; filling gets any code.
        """
        flat = codes[:, self.order.argsort()].reshape(-1, codes.shape[-1])
        return list(flat[cells.clamp(min=0)].unbind(-1))

    def to_columns(self, codes: Sequence[Tensor], cells: Tensor) -> Tensor:
        """The inverse of `to_books`."""
        flat = torch.zeros(self.rows * self.columns, len(codes), dtype=torch.int64)
        inside = cells >= 0
        flat[cells[inside]] = torch.stack(list(codes), dim=-1)[inside]
        return flat.reshape(self.rows, self.columns, -1)[:, self.order]

    def loss(self, error: Tensor) -> float:
        """`sum_r mass[r] * e_r H e_r^T` of `error`, laid out as `matrix`."""
        each = np.einsum("ri,ri->r", error.numpy(), product(error, self.hessian).numpy())
        return float((each * self.mass.reshape(-1).numpy()).sum())


def grid_of(target: Target, spec: CodebookSpec) -> Grid:
    """The grid of a target with a Hessian; heavy columns are coded first.

    A column that is coded late makes up for the errors of those before it, so what costs most goes
    first, when nothing has to be made up for yet: GPTQ's act-order, which needs no permutation in
    the format, as a code's place is where its column is. On MiniLM's layer-0 intermediate weight
    with correlated inputs it lowers the output error by 16 % along `out` and by 4 % along `in`.
    """
    assert target.hessian is not None, "a grid is laid out for a full Hessian"
    n, k = target.matrix.shape
    over, across = _cells(spec, n, k)
    hessian = target.hessian.double()
    diagonal = torch.cat([hessian.diagonal(), torch.zeros(1, dtype=torch.float64)])
    # a column's weight, padding left out: input k stands for all of it
    weight = diagonal[across.clamp(max=k)].sum(1)
    order = weight.argsort(descending=True, stable=True)
    across = across[order]
    inputs = across[across < k]
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), (across < k).sum(1).cumsum(0)])
    matrix = torch.cat([target.matrix.double(), torch.zeros(1, k, dtype=torch.float64)])
    factor = torch.ones(n) if target.rows is None else target.rows
    mass = torch.cat([factor.double(), torch.zeros(1, dtype=torch.float64)])
    rows = over.clamp(max=n)
    which = set_index(spec, n, k + spec.side_columns).expand(len(over), len(across))
    # a book's number is a row's share plus a column's (see set_index)
    step = (which[0] - which[0].min())[order]
    row_first = which[:, 0] - (which[0, 0] - which[0].min())
    first, numbers = (
        torch.from_numpy(found) for found in np.unique(row_first.numpy(), return_inverse=True)
    )
    return Grid(
        matrix=matrix[rows.reshape(-1)][:, inputs],
        mass=mass[rows],
        hessian=((hessian + hessian.T) / 2)[inputs][:, inputs],
        edges=tuple(edges.tolist()),
        span=across.shape[1],
        order=order,
        members=members(numbers, len(first)),
        first=first,
        row_first=row_first,
        step=step,
    )


def _cells(spec: CodebookSpec, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows of the matrix in each row of cells, and inputs in each column of them.

    `[rows, height]` and `[columns, span]`; n and k, and up, in padding.
    """
    rows, columns = code_grid(spec, n, k + spec.side_columns)
    if spec.vector_axis == "out":
        return _along(spec, rows), torch.arange(columns)[:, None]
    return torch.arange(rows * spec.vector_width).reshape(rows, -1), _along(spec, columns)


def _along(spec: CodebookSpec, vectors: int) -> Tensor:
    """Features of each vector along its axis: `[vectors, vector_length]`."""
    features = torch.arange(vectors * spec.vector_length)
    blocks = features.reshape(-1, spec.vector_length, spec.stride)
    return blocks.transpose(1, 2).reshape(vectors, spec.vector_length)
