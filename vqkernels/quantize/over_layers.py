"""Vectors of several layers, for codebooks that they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.parts import code_grid, codebook_sets
from vqkernels.quantize.coverage import Coverage, reached, together, warn
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.prepare import prepare
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.sampling import draw
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["over_layers"]

# A layer gets one in so many of the vectors that equal shares would give it, however small it is.
LEAST = 4

_DEFAULT = Recipe()


def over_layers(
    weights: Mapping[str, Tensor],
    spec: CodebookSpec,
    size: int,
    *,
    seed: int,
    recipe: Recipe = _DEFAULT,
    importance: Mapping[str, Tensor] | None = None,
) -> Vectors:
    """`size` vectors a book of all layers' weights at most, for codebooks that they share.

    weights: `[n, k]` each; read twice, one at a time, where the mapping reads them.
    recipe: how each layer's scales, rotation and limits are found.
    importance: of each layer's squared errors, where there is one: anything that broadcasts to its
        weight.

    Layers get shares by their number of vectors, none less than a quarter of an equal share; inside
    a layer as `sample` draws. The weights stay unbiased over all layers. Cells go on counting from
    layer to layer. Raises TensorError for what is no matrix, and for layers with other numbers of
    books. Warns as `sample`.
    """
    shapes = {name: _shape(name, weight) for name, weight in weights.items()}
    if not shapes:
        raise TensorError("over_layers: there are no layers; give one at least")
    books = {codebook_sets(spec, n, k) * spec.subspaces for n, k in shapes.values()}
    if len(books) > 1:
        raise TensorError(
            f"over_layers: layers have {min(books)} to {max(books)} codebooks in this format, and "
            f"can't share them; use one for the tensor"
        )
    cells = {name: math.prod(code_grid(spec, n, k)) for name, (n, k) in shapes.items()}
    counts = [math.ceil(count / max(books)) for count in cells.values()]
    sizes = _allotted(counts, size)
    kept, found, before = list[Vectors](), list[Coverage](), 0
    for number, (name, (n, k)) in enumerate(shapes.items()):
        matrix = weights[name].detach().cpu().float()
        each = None if importance is None else _broad(name, importance.get(name), n, k)
        target = prepare(spec, Target(matrix, each), recipe, seed=seed)[0]
        vectors = target.training().vectors(spec)
        some = draw(vectors, spec, n, k, sizes[number], (seed, number))
        found.append(reached(vectors, some, spec, n, k))
        moved = torch.where(some.cells < 0, some.cells, some.cells + before)
        kept.append(dataclasses.replace(some, cells=moved))
        before += cells[name]
    all_kept = _joined(kept)
    warn(together(found, all_kept, spec), f"the {len(shapes)} layers")
    return all_kept


def _shape(name: str, weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TensorError(
            f"{name}: {weight.dtype} {list(weight.shape)}; give matrices of floating-point numbers"
        )
    if not bool(torch.isfinite(weight).all()):
        raise TensorError(f"{name}: holds NaN or infinity; repair the checkpoint")
    return weight.shape[0], weight.shape[1]


def _broad(name: str, importance: Tensor | None, n: int, k: int) -> Tensor | None:
    if importance is None:
        return None
    try:
        return importance.detach().cpu().float().expand(n, k)
    except RuntimeError as error:
        raise TensorError(
            f"{name}: importance {list(importance.shape)} doesn't broadcast to [{n}, {k}]"
        ) from error


def _allotted(counts: Sequence[int], size: int) -> list[int]:
    """How many of each layer's `counts` vectors are drawn, `size` in all; 0 where all are."""
    if size == 0 or size >= sum(counts):
        return [0] * len(counts)
    least = [min(count, max(1, size // (LEAST * len(counts)))) for count in counts]
    left = size - sum(least)
    if left < 0:
        raise TensorError(
            f"over_layers: a sample of {size} for {len(counts)} layers; draw one for each at least"
        )
    more = [count - own for count, own in zip(counts, least, strict=True)]
    ends = [left * end // max(1, sum(more)) for end in np.cumsum(more).tolist()]
    extra = np.diff(ends, prepend=0).tolist()
    return [own + added for own, added in zip(least, extra, strict=True)]


def _joined(layers: Sequence[Vectors]) -> Vectors:
    weights = None
    if any(layer.weights is not None for layer in layers):
        each = [
            torch.ones(layer.points.shape[:2]) if layer.weights is None else layer.weights
            for layer in layers
        ]
        deep = any(one.ndim == 3 for one in each)
        length = layers[0].points.shape[-1]
        same = [
            one[..., None].expand(-1, -1, length) if deep and one.ndim == 2 else one for one in each
        ]
        weights = torch.cat(same, dim=1)
    points = torch.cat([layer.points for layer in layers], dim=1)
    return Vectors(points, weights, torch.cat([layer.cells for layer in layers], dim=1))
