"""Codes of one column of cells, in the metric that the column's inputs have in a Hessian.

An error e of the column costs |e root|^2, so cells and entries times `root` are plain vectors, and
what is nearest there is best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.quantize.grid import Grid
from vqkernels.quantize.sums import Sums

__all__ = ["decode_column", "search"]


def search(
    grid: Grid,
    column: int,
    entries: Sequence[Tensor],
    values: Tensor,
    root: Tensor,
    *,
    beam: int,
    known: Tensor | None = None,
) -> Tensor:
    """Codes `[rows, stages]` of a column whose cells should be `values: [rows * height, inputs]`.

    entries: `[books, entries, size]` float32 of each stage, as they decode.
    root: `[inputs, inputs]` float64.
    known: codes `[rows, stages]`. The result is nowhere worse, and best in each single stage.
    """
    inside = grid.members >= 0
    rows = grid.members.clamp(min=0)
    if grid.span > 1:  # of one input, the metric scales all errors alike
        values = values @ root
    which = grid.first + grid.step[column]
    cells = Sums(
        values.reshape(grid.rows, -1)[rows],
        [_turned(book[which], grid, root) for book in entries],
        _weights(grid, root.shape[1]),
    )
    found = cells.encode(beam)
    if known is not None:
        found = cells.improve(known[rows], found)
    codes = torch.zeros(grid.rows, len(entries), dtype=torch.int64)
    codes[rows[inside]] = found[inside]
    return codes


def decode_column(grid: Grid, column: int, entries: Sequence[Tensor], codes: Tensor) -> Tensor:
    """One column of the grid's `decode`: `[rows * height, inputs]` float64."""
    which = grid.row_first + grid.step[column]
    cells = torch.zeros(1, dtype=torch.float64)
    for stage, book in enumerate(entries):
        cells = cells + book[which, codes[:, column, stage]].double()
    width = grid.edges[column + 1] - grid.edges[column]
    return cells.reshape(grid.rows * grid.height, -1)[:, :width]


def _turned(book: Tensor, grid: Grid, root: Tensor) -> Tensor:
    """Entries of each set times `root`: `[sets, entries, height * inputs]`."""
    if grid.span == 1:
        return book
    patches = book.reshape(*book.shape[:2], grid.height, grid.span)[..., : len(root)]
    return (patches.double() @ root).reshape(*book.shape[:2], -1)


def _weights(grid: Grid, inputs: int) -> Tensor | None:
    """Weights of each cell's coordinates; None where all of a cell's rows count alike."""
    if bool((grid.mass == grid.mass[:, :1]).all()):
        return None
    each = grid.mass.repeat_interleave(inputs, dim=1).float()
    return each[grid.members.clamp(min=0)]
