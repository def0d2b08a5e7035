"""Codes by block coordinate descent on the layer's output error, a column of cells at a time.

As AQLM's beam search (Egiazarian et al. 2024), on the exact quadratic form: with all other codes
fixed, the best cells of a column of inputs S are its present ones plus (E H)_S inv(H_SS), in the
metric H_SS, where E = matrix - decoded. No step makes the error larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.quantize.cells import decode_column, search
from vqkernels.quantize.grid import Grid
from vqkernels.quantize.products import product
from vqkernels.quantize.propagate import blocks
from vqkernels.threads import one_thread

__all__ = ["descend"]


@one_thread()
def descend(grid: Grid, entries: Sequence[Tensor], codes: Tensor, *, beam: int) -> Tensor:
    """`codes: [rows, columns, stages]` after one sweep over all columns (Gauss and Seidel).

    entries: `[books, entries, size]` float32 of each stage, as they decode. Where a sweep changes
    nothing, no change of a single code helps.
    """
    codes = codes.clone()
    error = grid.matrix - grid.decode(entries, codes)
    for columns in blocks(grid):
        first, last = grid.edges[columns[0]], grid.edges[columns[-1] + 1]
        slope = product(error, grid.hessian[:, first:last])
        for column in columns:
            part = grid.inputs(column)
            root, inverse = _roots(grid.hessian[part, part])
            old, known = decode_column(grid, column, entries, codes), codes[:, column]
            best = old + slope[:, part.start - first : part.stop - first] @ inverse
            codes[:, column] = search(grid, column, entries, best, root, beam=beam, known=known)
            change = decode_column(grid, column, entries, codes) - old
            error[:, part] -= change
            slope -= change @ grid.hessian[part, first:last]
    return codes


def _roots(block: Tensor) -> tuple[Tensor, Tensor]:
    """A root r of a block of the Hessian, r r^T, and its pseudo-inverse: both `[inputs, inputs]`.

    Directions without weight (inputs never seen, fewer samples than inputs) have no slope either.
    """
    values, vectors = torch.linalg.eigh(block)
    seen = values > values.max() * 1e-12
    inverse = torch.where(seen, 1 / values.clamp(min=1e-300), 0.0)
    root = vectors * torch.where(seen, values, 0.0).sqrt()
    return root, vectors * inverse @ vectors.T
