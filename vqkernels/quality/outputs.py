"""Errors of a layer's outputs on given inputs, token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.quality.pieces import over_rows, share
from vqkernels.tensor import QuantizedTensor

__all__ = ["OutputError", "gaussian_inputs", "output_error"]

# Share of the tokens that the low cosine leaves below it.
_LOW = 0.01


@dataclasses.dataclass(frozen=True)
class OutputError:
    """How far `y^ = x W^^T` lies from `y = x W^T` over the tokens x; the bias is left out.

    A token's cosine is `y y^ / (|y| |y^|)`: 1 where both are zero, 0 where one of them is.

    tokens: how many.
    error: `sum |y - y^|^2 / sum |y|^2`, over all tokens.
    mean, low, worst: of the tokens' cosines: their mean, 1 % quantile (linear between neighbours,
        as numpy's) and smallest.
    """

    tokens: int
    error: float
    mean: float
    low: float
    worst: float


def output_error(weight: Tensor, tensor: QuantizedTensor, inputs: Tensor) -> OutputError:
    """Errors of the outputs of `tensor` against those of `weight: [n, k]`, for `inputs: [m, k]`.

    Raises TensorError for a weight that is no finite matrix of its shape, and for inputs that are
    not finite or of another width.
    """
    if inputs.ndim != 2 or inputs.shape[1] != tensor.k or not len(inputs):
        raise TensorError(
            f"inputs: shape {list(inputs.shape)}, but the layer takes [tokens, {tensor.k}]; "
            f"calibrate this model"
        )
    tokens = inputs.detach().cpu().double()
    if not bool(torch.isfinite(tokens).all()):
        raise TensorError("inputs: hold NaN or infinity; calibrate again")

    def measure(exact: Tensor, decoded: Tensor) -> Tensor:
        y, found = tokens @ exact.T, tokens @ decoded.T
        sums = [(y - found).square(), y.square(), found.square(), y * found]
        return torch.stack([one.sum(dim=1) for one in sums])

    found = over_rows(weight, tensor, measure, width=len(tokens))
    lost, energy, decoded, product = found.sum(axis=0)
    norms = np.sqrt(energy) * np.sqrt(decoded)
    alike = (energy == 0) & (decoded == 0)
    cosines = np.divide(product, norms, out=alike.astype(np.float64), where=norms > 0)
    cosines = cosines.clip(-1, 1)
    return OutputError(
        tokens=len(tokens),
        error=share(float(lost.sum()), float(energy.sum())),
        mean=float(cosines.mean()),
        low=float(np.quantile(cosines, _LOW)),
        worst=float(cosines.min()),
    )


def gaussian_inputs(k: int, *, tokens: int = 256, seed: int = 0) -> Tensor:
    """`[tokens, k]` float64 of independent standard normal numbers.

    What no calibration stands for: every input alike and independent. Real inputs are neither, so
    a layer's real output error may be far from the one on these.
    """
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((tokens, k)))
