"""Errors of the weights: each for itself, and as the layer's inputs weigh them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.quality.pieces import cosine, over_rows, share
from vqkernels.tensor import QuantizedTensor

__all__ = ["Distortion", "RunError", "distortion", "run_error"]


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How far the decoded weights lie from the dense ones.

    mse: `sum E^2 / (n k)`, in squared units of the weight.
    relative_error: `sum E^2 / sum W^2`; of an all-zero W, 0 if it is exact and inf if not.
    cosine: `sum W W^ / sqrt(sum W^2 * sum W^^2)`, of the whole matrices as two vectors.
    max_error: `max |E|`, in units of the weight.
    weighted_error: `sum h_j E_ij^2 / sum h_j W_ij^2` with h_j the mean square of input j; None
        where that isn't known.
    """

    mse: float
    relative_error: float
    cosine: float
    max_error: float
    weighted_error: float | None = None


@dataclasses.dataclass(frozen=True)
class RunError:
    """How far the layer's outputs lie apart over a whole run, from the gram of its inputs alone.

    Without the layer's bias, which is in both and would hide what is lost.

    error: `tr(E G E^T) / tr(W G W^T)`, with G the mean of x^T x: the run's sum of squared output
        errors over its sum of squared outputs.
    cosine: `tr(W G W^^T) / sqrt(tr(W G W^T) tr(W^ G W^^T))`, of all outputs as two vectors.
    """

    error: float
    cosine: float


def distortion(
    weight: Tensor, tensor: QuantizedTensor, *, diagonal: Tensor | None = None
) -> Distortion:
    """Errors of `tensor` against `weight: [n, k]`; `diagonal: [k]` gives the weighted one.

    Raises TensorError for a weight that is no finite matrix of its shape, and for a diagonal that
    has another length or isn't finite and at least 0.
    """
    inputs = _checked(diagonal, (tensor.k,), "diagonal")

    def measure(exact: Tensor, decoded: Tensor) -> Tensor:
        lost = exact - decoded
        squares, energy = lost.square(), exact.square()
        sums = [squares.sum(), energy.sum(), decoded.square().sum(), (exact * decoded).sum()]
        sums += [] if inputs is None else [(squares @ inputs).sum(), (energy @ inputs).sum()]
        return torch.stack([lost.abs().max(), *sums])

    found = over_rows(weight, tensor, measure)
    error, energy, decoded, product, *weighted = found[:, 1:].sum(axis=0).tolist()
    return Distortion(
        mse=error / (tensor.n * tensor.k),
        relative_error=share(error, energy),
        cosine=cosine(product, energy, decoded),
        max_error=float(found[:, 0].max()),
        weighted_error=share(*weighted) if weighted else None,
    )


def run_error(weight: Tensor, tensor: QuantizedTensor, gram: Tensor) -> RunError:
    """Errors of the outputs of `tensor` against those of `weight: [n, k]`, for `gram: [k, k]`.

    Raises TensorError as `distortion` does. Takes 4 n k^2 operations in float64.
    """
    inputs = _checked(gram, (tensor.k, tensor.k), "gram")
    assert inputs is not None

    def measure(exact: Tensor, decoded: Tensor) -> Tensor:
        lost = exact - decoded
        outputs, errors = exact @ inputs, lost @ inputs
        return torch.stack([(errors * lost).sum(), (outputs * exact).sum(), (outputs * lost).sum()])

    error, energy, both = over_rows(weight, tensor, measure).sum(axis=0).tolist()
    # W^ = W - E, so its terms follow from those of W and E
    decoded = energy - 2 * both + error
    return RunError(error=share(error, energy), cosine=cosine(energy - both, energy, decoded))


def _checked(value: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    if value is None:
        return None
    wide = value.detach().cpu().double()
    if tuple(wide.shape) != shape:
        raise TensorError(
            f"{name}: shape {list(wide.shape)}, but the layer needs {list(shape)}; "
            f"calibrate this model"
        )
    # a diagonal below 0, or a diagonal of a gram, is no mean of squares
    squares = wide if wide.ndim == 1 else wide.diagonal()
    if not bool(torch.isfinite(wide).all()) or bool((squares < 0).any()):
        raise TensorError(f"{name}: holds NaN, infinity or negative squares; calibrate again")
    return wide
