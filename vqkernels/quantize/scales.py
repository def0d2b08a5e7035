"""Scale and zero of a weight, per tensor, row or column, and what is left when they are taken off.

    zero   scale  scaling     is
    any    any    rms, std    z-score: global, of rows (as a layer norm has it) or of columns
    none   any    l2          L2 normalisation
    any    none               centring
    none   any    rms, max    a spread of about 1, or at most 1

Both are computed in float64, the scale of what the zero leaves, and rounded to `side_dtype` before
they are used: what they lose in rounding is left to the codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.quantize.codebook import round_to
from vqkernels.quantize.recipe import Recipe, Scaling
from vqkernels.spec import CodebookSpec, ScaleAxis

__all__ = ["clip_limits", "error_units", "fit_scales", "normalise"]

_AXES: dict[ScaleAxis, int | None] = {"tensor": None, "row": 1, "column": 0}

Values = npt.NDArray[np.float64]


def fit_scales(
    spec: CodebookSpec, matrix: Tensor, scaling: Scaling, columns: Tensor | None = None
) -> dict[str, Tensor]:
    """The parts `zero` and `scale` of `matrix: [n, k]`, as far as `spec` has them.

    columns: input features that a tensor's or a row's are taken of; None: all. A scale of 0
    becomes 1.
    """
    parts: dict[str, Tensor] = {}
    if spec.zero_axis != "none":
        # numpy: torch's sum of a whole tensor rounds differently with the number of threads
        mean = _some(matrix, spec.zero_axis, columns).mean(axis=_AXES[spec.zero_axis])
        parts["zero"] = round_to(torch.from_numpy(mean.reshape(-1)), spec.side_dtype, "side_dtype")
    if spec.scale_axis != "none":
        values = _some(_centred(spec, matrix, parts), spec.scale_axis, columns)
        size = _size(values, scaling, _AXES[spec.scale_axis])
        stored = round_to(torch.from_numpy(size.reshape(-1)), spec.side_dtype, "side_dtype")
        parts["scale"] = torch.where(stored == 0, torch.ones_like(stored), stored)
    return parts


def normalise(spec: CodebookSpec, matrix: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """`(W - zero) / scale` of `W: [n, k]`, float32, with the zero and scale that are stored."""
    if spec.scale_axis == "none" and spec.zero_axis == "none":
        return matrix
    values = _centred(spec, matrix, parts)
    if spec.scale_axis != "none":
        scale = parts["scale"].double()
        # of another's tensor; nothing of the weight is left there, whatever the codes
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        values = values / _along(scale, spec.scale_axis)
    return values.float()


def error_units(
    spec: CodebookSpec, parts: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """What an error of the scaled weight is multiplied by in the weight's own units.

    One factor a row `[n]` or one a column `[k]`, float64, relative to the largest (squares of
    small ones would underflow in float32); None where all are the same.
    """
    if spec.scale_axis in ("none", "tensor"):
        return None, None
    factor = parts["scale"].double().abs()
    factor = factor / factor.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (factor, None) if spec.scale_axis == "row" else (None, factor)


def clip_limits(weight: Tensor, recipe: Recipe) -> tuple[float, float] | None:
    """What `recipe.clip` limits the weight to while codebooks are trained; None: to nothing.

    The percentiles `clip` and `100 - clip` of all weights, between neighbours where they fall so.
    """
    if recipe.clip == 0:
        return None
    values = weight.detach().cpu().float().numpy()
    low, high = np.percentile(values, [recipe.clip, 100 - recipe.clip])
    return float(low), float(high)


def _along(values: Tensor, axis: ScaleAxis) -> Tensor:
    return values[:, None] if axis == "row" else values


def _centred(spec: CodebookSpec, matrix: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if spec.zero_axis == "none":
        return matrix.double()
    return matrix.double() - _along(parts["zero"].double(), spec.zero_axis)


def _some(matrix: Tensor, axis: ScaleAxis, columns: Tensor | None) -> Values:
    """The values that statistics along `axis` are taken of."""
    if columns is not None and axis != "column":
        matrix = matrix[:, columns]
    return matrix.double().numpy()


def _size(values: Values, scaling: Scaling, axis: int | None) -> Values:
    if scaling == "max":
        size = np.abs(values).max(axis=axis)
    elif scaling == "std":
        size = values.std(axis=axis)
    elif scaling == "l2":
        size = np.sqrt(np.square(values).sum(axis=axis))
    else:
        size = np.sqrt(np.square(values).mean(axis=axis))
    return np.asarray(size)
