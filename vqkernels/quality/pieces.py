"""A weight and its decode side by side, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.tensor import QuantizedTensor, row_step
from vqkernels.threads import workers

__all__ = ["cosine", "over_rows", "share"]

# Weights of a piece: 8 MiB in float64, and a few such arrays a thread.
_PIECE = 1 << 20

Measure = Callable[[Tensor, Tensor], Tensor]


def over_rows(
    weight: Tensor, tensor: QuantizedTensor, measure: Measure, *, width: int = 0
) -> npt.NDArray[np.float64]:
    """`measure(W, W^)` of each piece of rows, both float64 on the CPU: `[pieces, ...]`.

    width: of what `measure` makes of a row, where that is wider than the row itself.

    Raises TensorError for a weight that is no finite matrix of the shape of `tensor`.
    """
    _check(weight, tensor)
    step = row_step(tensor.spec)
    span = max(step, _PIECE // max(tensor.k, width) // step * step)

    def piece(start: int) -> Tensor:
        stop = min(start + span, tensor.n)
        rows = weight[start:stop].detach().cpu().double()
        return measure(rows, tensor.rows(start, stop).to("cpu").decode())

    with workers() as pool:
        found = list(pool.map(piece, range(0, tensor.n, span)))
    return torch.stack(found).numpy()


def share(part: float, whole: float) -> float:
    """`part / whole`; of nothing, 0 where `part` is nothing too, and else infinity."""
    if whole:
        return max(0.0, part) / whole
    return float("inf") if part > 0 else 0.0


def cosine(product: float, one: float, other: float) -> float:
    """Cosine from an inner product and two squared norms; of two zeros 1, of one of them 0."""
    if one <= 0 or other <= 0:
        return 1.0 if one <= 0 and other <= 0 else 0.0
    # rounding may carry it past 1 by an ulp
    return max(-1.0, min(1.0, product / (math.sqrt(one) * math.sqrt(other))))


def _check(weight: Tensor, tensor: QuantizedTensor) -> None:
    if tuple(weight.shape) != (tensor.n, tensor.k):
        raise TensorError(
            f"weight: shape {list(weight.shape)}, but the tensor is {tensor.n} x {tensor.k}; "
            f"give the weight that it was made from"
        )
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise TensorError(
            "weight: holds NaN, infinity or whole numbers; give the weight that it was made from"
        )
