"""The columns that bypass the main codebooks: which they are, and how they are stored.

Outlier columns are dense, or have a codebook of their own with vectors along output features (Liu
et al. 2024, "VPTQ"); uniform columns are a code times a scale plus a zero, one of each a column.
Dettmers et al. 2022 ("LLM.int8()") keep the columns of outlier features out likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.quantize import vptq
from vqkernels.quantize.codebook import round_to
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.layout import join, split
from vqkernels.quantize.propagate import column_order
from vqkernels.quantize.recipe import Recipe, SideBy
from vqkernels.spec import CodebookSpec

__all__ = ["code_sides", "column_scores", "fit_uniform", "stored_order", "uniform_codes"]

# How far from the mean towards each end a column's grid reaches at first: with few bits, the best
# one leaves the extremes outside. Least squares goes on from each pair.
_REACH = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
_ROUNDS = 6

Values = npt.NDArray[np.float64]


def column_scores(
    centred: Tensor,
    weights: Tensor | None,
    by: SideBy,
    errors: Callable[[], Tensor] | None = None,
) -> Tensor:
    """How much is at stake in each column of `centred: [n, k]`: `[k]` float64.

    by: `hessian`: squares times `weights: [n, k]` (of a Hessian, the diagonal); `magnitude`:
        squares; `error`: weighted squares of `errors()`, what codebooks alone leave; `auto`, and
        `error` without `errors`: by the weights where there are some, else by magnitude.
    """
    left = errors() if by == "error" and errors is not None else centred
    squares = left.double().square()
    if weights is not None and by != "magnitude":
        squares = squares * weights
    return torch.from_numpy(squares.numpy().sum(axis=0))


def stored_order(spec: CodebookSpec, scores: Tensor) -> Tensor:
    """Input features in the order in which `spec` stores them: `[k]`, for `scores: [k]`.

    Side columns first, those with the most at stake, most first. Of the main ones, vectors along
    `in` get a mixture each, dealt out in the order of their scores: each place of a vector then
    has features that matter alike, and a codebook spends its entries on the places that do. With
    columns of normal numbers whose sizes are log-normal (sigma 0.3), RQ with 64 + 16 entries of 4
    leaves 0.81 of the error that it leaves in the features' own order; sorted, that alike lie in
    one vector, it leaves more than in that. Otherwise, and before a rotation, which mixes them
    anyway, they keep their order.
    """
    order = column_order(scores)
    sides, main = order[: spec.side_columns], order[spec.side_columns :]
    if spec.vector_axis == "out" or spec.rotation_size:
        return torch.cat([sides, main.sort().values])
    length, stride = spec.vector_length, spec.stride
    vectors = torch.arange(-(-len(main) // (length * stride)) * stride)
    starts = vectors // stride * length * stride + vectors % stride
    places = (torch.arange(length)[:, None] * stride + starts).reshape(-1)
    dealt = torch.empty_like(main)
    dealt[places[places < len(main)]] = main
    return torch.cat([sides, dealt])


def code_sides(
    spec: CodebookSpec,
    columns: Tensor,
    weights: Tensor | None,
    known: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """The parts of the side columns `[n, side_columns]`; `weights` of their errors, or None.

    known: parts that are not found anew: the outlier codebook, uniform scale and zero.
    """
    count, parts = spec.outlier_columns, dict[str, Tensor]()
    left, right = (None, None) if weights is None else (weights[:, :count], weights[:, count:])
    if spec.outlier_entries:
        parts |= _by_codebook(spec, columns[:, :count], left, known, recipe, seed)
    elif count:
        parts["outliers"] = round_to(columns[:, :count], spec.side_dtype, "side_dtype")
    if spec.uniform_columns:
        values, bits = columns[:, count:], spec.uniform_bits
        if "uniform_scale" in known:
            scale, zero = known["uniform_scale"], known["uniform_zero"]
        else:
            scale, zero = fit_uniform(values, right, bits, spec.side_dtype)
        codes = uniform_codes(values, scale, zero, bits)
        parts |= {"uniform_scale": scale, "uniform_zero": zero, "uniform_codes": codes}
    return parts


# ------------------------------------------------------------------------------------------------
# outliers by a codebook


def _by_codebook(
    spec: CodebookSpec,
    columns: Tensor,
    weights: Tensor | None,
    known: Mapping[str, Tensor],
    recipe: Recipe,
    seed: int,
) -> dict[str, Tensor]:
    if (book := known.get("outlier_codebook")) is None:
        codes, book = vptq.outlier_codebook(columns, spec, recipe, weights=weights, seed=seed)
        return {"outlier_codes": codes, "outlier_codebook": book}
    view = CodebookSpec(
        vector_length=spec.outlier_vector_length,
        stages=(spec.outlier_entries,),
        vector_axis="out",
    )
    vectors = split(view, columns, weights)
    codes = assign(vectors.points, book.float()[None], weights=vectors.weights)
    n, count = columns.shape
    grid = join(view, n, count, vectors.cells, [codes])[..., 0]
    return {"outlier_codes": grid, "outlier_codebook": book}


# ------------------------------------------------------------------------------------------------
# uniform


def fit_uniform(
    columns: Tensor, weights: Tensor | None, bits: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """The scale and the zero of each of `columns: [n, count]`, in `dtype`, with the least error.

    From grids that reach the extremes or only a part of the way, codes and (scale, zero) are found
    in turns, the latter by least squares (k-means, but with all entries on a line). Each is judged
    as it is stored.
    """
    round_to(columns, dtype, "side_dtype")  # refuses what a zero couldn't be
    kind: torch.dtype = getattr(torch, dtype)
    pairs = [
        _fit_column(column.double().numpy(), _weight(weights, number), (1 << bits) - 1, kind)
        for number, column in enumerate(columns.T)
    ]
    scale, zero = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    return round_to(scale, dtype, "side_dtype"), round_to(zero, dtype, "side_dtype")


def uniform_codes(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The code nearest to each element of `columns: [n, count]`: uint8."""
    step = scale.double()
    step = torch.where(step == 0, torch.inf, step)  # of another's tensor: every code is the zero
    codes = ((columns.double() - zero.double()) / step).round()
    return codes.clamp(0, (1 << bits) - 1).to(torch.uint8)


def _weight(weights: Tensor | None, column: int) -> Values | float:
    return 1.0 if weights is None else weights[:, column].double().numpy()


def _fit_column(
    column: Values, weights: Values | float, top: int, dtype: torch.dtype
) -> tuple[float, float]:
    """The best (scale, zero) of one column, both exact in `dtype`."""
    mean, reach = column.mean(), np.array(_REACH)
    lows, highs = np.meshgrid(
        mean + reach * (column.min() - mean), mean + reach * (column.max() - mean)
    )
    scales, zeros = (highs - lows).ravel() / top, lows.ravel()
    best, found = np.inf, (float(scales[0]), float(zeros[0]))
    for _ in range(_ROUNDS):
        scales, zeros = _stored(scales, zeros, dtype)
        codes = np.rint((column - zeros[:, None]) / scales[:, None]).clip(0, top)
        lost = column - codes * scales[:, None] - zeros[:, None]
        errors = (weights * np.square(lost)).sum(axis=1)
        first = int(errors.argmin())
        if errors[first] < best:
            best, found = float(errors[first]), (float(scales[first]), float(zeros[first]))
        scales, zeros = _least_squares(column, codes, weights, scales, zeros)
    return found


def _stored(scales: Values, zeros: Values, dtype: torch.dtype) -> tuple[Values, Values]:
    """Both as `dtype` holds them, as far as it does; a scale that would be 0 is the smallest."""
    limits = torch.finfo(dtype)
    scales, zeros = (
        torch.from_numpy(values).clamp(limits.min, limits.max).to(dtype).double().numpy()
        for values in (scales, zeros)
    )
    return np.where(scales == 0, limits.smallest_normal * limits.eps, scales), zeros


def _least_squares(
    column: Values, codes: Values, weights: Values | float, scales: Values, zeros: Values
) -> tuple[Values, Values]:
    """Scale and zero of least error for each of `codes: [candidates, n]`; as before if none is."""
    mass = np.broadcast_to(weights, codes.shape)
    total = mass.sum(axis=1)
    total = np.where(total > 0, total, 1)
    middle, code = (mass * column).sum(axis=1) / total, (mass * codes).sum(axis=1) / total
    apart = codes - code[:, None]
    spread = (mass * np.square(apart)).sum(axis=1)
    shared = (mass * apart * column).sum(axis=1)
    fitted = np.divide(shared, spread, out=scales.copy(), where=spread > 0)
    usable = fitted > 0
    return np.where(usable, fitted, scales), np.where(usable, middle - fitted * code, zeros)
