"""From a weight to what its codebooks have to come near, and the side parts found on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.quantize.codebook import round_to
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["prepare", "target_of"]


def prepare(
    spec: CodebookSpec, matrix: Tensor, weights: Tensor | None, hessian: Tensor | None
) -> tuple[Target, dict[str, Tensor]]:
    """The target of `matrix: [n, k]` float32, and the parts of `spec` beside codes and codebooks.

    weights: `[n, k]` or None; hessian: `[k, k]` or None.
    """
    scale = _scale(spec, matrix)
    parts = {} if scale is None else {"scale": scale}
    return target_of(spec, matrix, weights, hessian, parts), parts


def target_of(
    spec: CodebookSpec,
    matrix: Tensor,
    weights: Tensor | None,
    hessian: Tensor | None,
    parts: dict[str, Tensor],
) -> Target:
    """The target of `matrix` where the side parts are known already."""
    scale = parts.get("scale")
    if scale is None:
        return Target(matrix, weights, hessian)
    factor = scale.double()[:, None] if spec.scale_axis == "row" else scale.double()
    if spec.scale_axis != "tensor":
        # an error of the scaled weight counts in the weight's own units
        # (relative to the largest: squares of small scales would underflow in float32)
        squares = (factor / factor.max()).square().expand(matrix.shape)
        weights = (squares if weights is None else squares * weights).float()
    return Target((matrix / factor).float(), weights, hessian)


def _scale(spec: CodebookSpec, matrix: Tensor) -> Tensor | None:
    """Root mean square of each row or column, or of all, as it is stored; 1 where that is 0."""
    if spec.scale_axis == "none":
        return None
    # numpy: torch's sum of a whole tensor rounds differently with the number of threads
    squares = matrix.double().square().numpy()
    axis = {"tensor": None, "row": 1, "column": 0}[spec.scale_axis]
    rms = torch.from_numpy(squares.mean(axis=axis).reshape(-1)).sqrt()
    stored = round_to(rms, spec.side_dtype, "side_dtype")
    return torch.where(stored == 0, torch.ones_like(stored), stored)
