"""Codebooks that several layers share: trained once, on vectors sampled from all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from vqkernels.quantize import rq
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.over_layers import over_layers
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

__all__ = ["train"]

# Vectors for each entry, unless the recipe says how many in all: at 32 a layer's own codebooks have
# 5 % more distortion than from all vectors (see `sampling`), and these have all layers to cover.
PER_ENTRY = 128

_DEFAULT = Recipe()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sample(Target):
    """Vectors of several matrices, which make no matrix."""

    sampled: Vectors

    def vectors(self, _: CodebookSpec) -> Vectors:
        """Those that were sampled."""
        return self.sampled


def train(
    weights: Mapping[str, Tensor],
    spec: CodebookSpec,
    *,
    recipe: Recipe = _DEFAULT,
    seed: int = 0,
    importance: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """What `quantize(codebooks=...)` takes, for each of the layers `weights: [n, k]`.

    weights, importance: as `over_layers` takes them, so a layer at a time. A full Hessian
    has no say in what is shared. Raises TensorError for layers that can't share codebooks, and
    UnsupportedError where an entry overflows the codebooks' dtype.
    """
    size = recipe.sample or PER_ENTRY * spec.max_entries
    vectors = over_layers(weights, spec, size, seed=seed, importance=importance, recipe=recipe)
    # sampled they are already; all methods are residual ones where no full Hessian is known
    whole = dataclasses.replace(recipe, sample=0)
    stages = rq.fit(_Sample(torch.empty(0, 0), sampled=vectors), spec, whole, seed=seed)
    books = len(vectors.points) // spec.subspaces
    return [
        stage.entries.reshape(books, spec.subspaces, entries, spec.vector_size)
        for stage, entries in zip(stages, spec.stages, strict=True)
    ]
