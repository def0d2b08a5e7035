"""From a weight to what its codebooks have to come near, and the side parts found on the way.

The inverse of a decode, in turn: zero and scale are taken off, columns permuted, side columns
coded, what they lost made up for by the main ones (with a full Hessian), and the main ones rotated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vqkernels.quantize import propagate
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.rotation import fit_rotation, rotate
from vqkernels.quantize.scales import clip_limits, error_units, fit_scales, normalise
from vqkernels.quantize.sides import code_sides, column_scores, stored_order
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, decode_sides

__all__ = ["prepare", "target_of"]

_DEFAULT = Recipe()

# Parts that say what the codebooks and the side columns made of one weight.
_CODED = ("codes", "outliers", "outlier_codes", "uniform_codes")


def prepare(
    spec: CodebookSpec,
    weight: Target,
    recipe: Recipe = _DEFAULT,
    *,
    seed: int,
    errors: Callable[[], Tensor] | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> tuple[Target, dict[str, Tensor]]:
    """The target of a weight, and the parts of `spec` beside codes and codebooks.

    weight: all its columns, as they are.
    errors: what codebooks alone leave of the weight, `[n, k]`; called where `recipe.sides` asks
        for it. Without one, side columns are chosen as by `auto`.
    known: parts that are taken as they are, of a tensor that is coded anew.
    """
    found = dict(known or {})
    order = _order(spec, weight, recipe, errors, found)
    if not found.keys() & {"scale", "zero"}:
        columns = order[spec.side_columns :]
        found |= fit_scales(spec, weight.matrix, recipe.scaling, columns)
    target = _scaled(spec, weight, recipe, found)
    if spec.permuted:
        dtype = torch.uint16 if len(order) <= 65536 else torch.int32
        found["permutation"] = order.to(dtype)
        target = target.columns(order)
    if spec.side_columns:
        sides = target.columns(slice(None, spec.side_columns))
        found |= code_sides(spec, sides.matrix, sides.weights, found, recipe, seed=seed)
        target = _main(spec, target, recipe, found)
    if spec.rotation_size:
        if "rotation" not in found:
            found["rotation"] = fit_rotation(target, spec, recipe, seed=seed)
        target = rotate(target, found["rotation"])
    return target, found


def target_of(tensor: QuantizedTensor, weight: Target) -> tuple[Target, dict[str, Tensor]]:
    """The target of a weight in a tensor's scales, columns and rotation, and the tensor's parts.

    Among the parts, side columns are the weight's; codes are left out.
    """
    known = {name: part for name, part in tensor.parts.items() if name not in _CODED}
    return prepare(tensor.spec, weight, seed=0, known=known)


def _order(
    spec: CodebookSpec,
    weight: Target,
    recipe: Recipe,
    errors: Callable[[], Tensor] | None,
    found: Mapping[str, Tensor],
) -> Tensor:
    """Input features in stored order: `[k]` int64."""
    if "permutation" in found:
        return found["permutation"].long()
    if not spec.permuted:
        return torch.arange(weight.matrix.shape[1])
    # a zero of all columns: which of them are the main ones isn't known yet
    plain = dataclasses.replace(spec, scale_axis="none")
    centred = normalise(plain, weight.matrix, fit_scales(plain, weight.matrix, recipe.scaling))
    scores = column_scores(centred, weight.weights, recipe.sides, errors)
    return stored_order(spec, scores)


def _scaled(
    spec: CodebookSpec, weight: Target, recipe: Recipe, parts: Mapping[str, Tensor]
) -> Target:
    """The weight without zero and scale, whose errors count as in its own units."""
    matrix = normalise(spec, weight.matrix, parts)
    limited = None
    if (limits := clip_limits(weight.matrix, recipe)) is not None:
        limited = normalise(spec, weight.matrix.clamp(*limits), parts)
    weights, hessian, rows = weight.weights, weight.hessian, weight.rows
    of_row, of_column = error_units(spec, parts)
    if of_column is not None:
        if hessian is not None:
            hessian = (hessian * of_column[:, None] * of_column).float()
        weights = _times(weights, of_column.square().expand(matrix.shape))
    if of_row is not None:
        squares = of_row.square()
        rows = squares.float() if rows is None else (rows * squares).float()
        weights = _times(weights, squares[:, None].expand(matrix.shape))
    return Target(matrix, weights, hessian, rows, limited)


def _times(weights: Tensor | None, factors: Tensor) -> Tensor:
    return factors.float() if weights is None else (factors * weights).float()


def _main(
    spec: CodebookSpec, target: Target, recipe: Recipe, parts: Mapping[str, Tensor]
) -> Target:
    """The main columns, moved to make up for what the side columns lost where that is asked for."""
    n, k = target.matrix.shape
    main = target.columns(slice(spec.side_columns, None))
    if target.hessian is None or not recipe.propagate:
        return main
    stored = decode_sides(n, parts, torch.float64)
    moved = propagate.compensate(
        main.matrix,
        target.matrix[:, : spec.side_columns] - stored,
        target.hessian,
        torch.arange(spec.side_columns),
        torch.arange(spec.side_columns, k),
        recipe.damping,
    )
    limited = None if main.limited is None else main.limited + (moved - main.matrix)
    return dataclasses.replace(main, matrix=moved, limited=limited)
