"""What storing codebooks in their dtype costs, against float32 entries for the same codes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.prepare import target_of
from vqkernels.quantize.refit import decode, refit, squared_errors
from vqkernels.quantize.target import Target
from vqkernels.tensor import QuantizedTensor, scaled_codebook

__all__ = ["RoundingCost", "rounding_cost"]


@dataclasses.dataclass(frozen=True)
class RoundingCost:
    """Relative squared errors of the coded columns, with the same codes.

    stored: with the entries as they are stored.
    float32: with the float32 entries that least squares finds for these codes.
    """

    stored: float
    float32: float

    @property
    def ratio(self) -> float:
        """How many times the error is larger than with float32 entries; 1 where both are exact."""
        if self.float32:
            return self.stored / self.float32
        return float("inf") if self.stored else 1.0


def rounding_cost(
    weight: Tensor, tensor: QuantizedTensor, *, weights: Tensor | None = None
) -> RoundingCost:
    """What the entries of `tensor`, `weight: [n, k]` coded, lost by their dtype (and training).

    weights: importance of each squared error, `[n, k]` or anything that broadcasts to it.

    Errors count as in codebook training: side columns are left out, scales taken into account.
    """
    tensor = tensor.to("cpu")
    spec, matrix = tensor.spec, weight.detach().cpu().float()
    each = None if weights is None else weights.detach().cpu().float().expand(matrix.shape)
    vectors = target_of(tensor, Target(matrix, each))[0].vectors(spec)
    grid = tensor.parts["codes"].to(torch.int64).reshape(-1, len(spec.stages))
    codes = list(grid[vectors.cells.clamp(min=0)].unbind(-1))
    stored = [
        scaled_codebook(spec, tensor.parts, stage, torch.float32).flatten(0, 1)
        for stage in range(len(spec.stages))
    ]
    # an unweighted filling vector would be a vector to the least squares
    assert vectors.weights is not None or bool((vectors.cells >= 0).all())
    best = refit(vectors.points, codes, stored, weights=vectors.weights)
    total = _sum(vectors, vectors.points)
    lost = [_sum(vectors, vectors.points - decode(codes, books)) for books in (stored, best)]
    if not total:
        return RoundingCost(*(float("inf") if error else 0.0 for error in lost))
    return RoundingCost(lost[0] / total, min(lost) / total)


def _sum(vectors: Vectors, left: Tensor) -> float:
    # numpy: torch's sum of a whole tensor rounds differently with the number of threads
    return float(squared_errors(left, vectors.weights).numpy().sum())
