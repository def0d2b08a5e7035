"""Codes found a column of cells after another, each making up for the errors of those before.

GPTQ (Frantar et al. 2022) for vectors: GPTVQ (van Baalen et al. 2024) along `in`, where a column of
cells covers `vector_length` inputs, and VPTQ (Liu et al. 2024) along `out`, where it covers one.
With H = X^T X and U the upper Cholesky factor of inv(H) = U^T U, an error e of the inputs S costs
|e inv(U_SS)|^2 once the later inputs T have moved by -e inv(U_SS) U_ST, the best they can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.quantize.cells import decode_column, search
from vqkernels.quantize.grid import Grid, grid_of
from vqkernels.quantize.products import product
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.threads import one_thread

__all__ = ["blocks", "column_order", "compensate", "encode", "walk"]

# Inputs whose errors reach the later ones together: one product in place of 128 outer ones.
LAZY = 128


def encode(
    target: Target, spec: CodebookSpec, codebooks: Sequence[Tensor], recipe: Recipe
) -> list[Tensor]:
    """Codes of each stage, `[books, count]` int64, for the vectors of a target with a Hessian.

    codebooks: `[books, entries, size]` float32 of each stage, as they decode.

    Raises TensorError where the Hessian needs more of `recipe.damping`.
    """
    grid = grid_of(target, spec)
    codes = walk(grid, codebooks, beam=recipe.beam, damping=recipe.damping)
    return grid.to_books(codes, target.vectors(spec).cells)


@one_thread()
def walk(grid: Grid, entries: Sequence[Tensor], *, beam: int, damping: float) -> Tensor:
    """`encode` on a grid: codes `[rows, columns, stages]`."""
    factor = _factor(_damped(grid.hessian, damping))
    left = grid.matrix.clone()
    codes = torch.zeros(grid.rows, grid.columns, len(entries), dtype=torch.int64)
    for columns in blocks(grid):
        first, last = grid.edges[columns[0]], grid.edges[columns[-1] + 1]
        errors = torch.empty(len(left), last - first, dtype=torch.float64)
        for column in columns:
            part = grid.inputs(column)
            root = torch.linalg.inv(factor[part, part])
            values = left[:, part]
            codes[:, column] = search(grid, column, entries, values, root, beam=beam)
            error = (values - decode_column(grid, column, entries, codes)) @ root
            errors[:, part.start - first : part.stop - first] = error
            left[:, part.stop : last] -= error @ factor[part, part.stop : last]
        left[:, last:] -= product(errors, factor[first:last, last:])
    return codes


def blocks(grid: Grid) -> list[list[int]]:
    """The columns of cells in runs of about `LAZY` inputs.

    A column without inputs (of a stride's last block) decodes to nothing, and keeps its codes.
    """
    columns = [c for c in range(grid.columns) if grid.edges[c] < grid.edges[c + 1]]
    step = max(1, LAZY // grid.span)
    return [columns[first : first + step] for first in range(0, len(columns), step)]


def column_order(diagonal: Tensor) -> Tensor:
    """Inputs by their Hessian's diagonal `[k]`, the heaviest first: GPTQ's act-order."""
    return diagonal.argsort(descending=True, stable=True)


@one_thread()
def compensate(
    main: Tensor,
    side_error: Tensor,
    hessian: Tensor,
    side: Tensor,
    main_index: Tensor,
    damping: float,
) -> Tensor:
    """`main: [n, main]` moved so that it makes up best for the error of the side columns.

    side_error: `[n, sides]`, exact minus stored.
    side, main_index: the inputs, in `hessian: [k, k]`, of the side and the main columns.
    With H_mm damped (as in Recipe), the shift is `side_error H_sm inv(H_mm)`, which leaves the
    least output error that any main columns can. Raises TensorError as `encode` does.
    """
    between = hessian[side][:, main_index].double()
    lower = _cholesky(_damped(hessian[main_index][:, main_index].double(), damping))
    shift = torch.cholesky_solve(between.T.contiguous(), lower).T
    return (main.double() + product(side_error.double(), shift.contiguous())).to(main.dtype)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` with `damping` times the mean of its diagonal added, and a little to dead inputs.

    A dead input, one that was 0 in every sample, has a row and a column of zeros. It has to count
    for something, so that the matrix can be inverted, but not in the choice of codes.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.numpy().mean())
    dead = diagonal <= 0
    added = torch.where(dead, max(1e-6, damping) * mean if mean > 0 else 1.0, damping * mean)
    return hessian + added.diag()


def _factor(hessian: Tensor) -> Tensor:
    """The upper triangle U with inv(hessian) = U^T U.

    Factored from the last input to the first, H = R R^T with R upper; U is the inverse of R.
    """
    upper = _cholesky(hessian.flip(0, 1)).flip(0, 1)
    one = torch.eye(len(upper), dtype=upper.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(upper, one, upper=True)
    return inverse


def _cholesky(hessian: Tensor) -> Tensor:
    found = torch.linalg.cholesky_ex(hessian)
    if int(found.info):
        raise TensorError(
            "hessian: is not positive definite, even damped; raise the recipe's damping or "
            "calibrate on more tokens"
        )
    lower: Tensor = found.L
    return lower
