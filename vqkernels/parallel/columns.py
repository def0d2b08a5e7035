"""Which stored columns a rank has of a matrix that is cut by input features.

Stored columns are outliers, uniform ones, then main ones; stored column `c` is input feature
`permutation[c]`. A rank keeps those of its features in the order they are stored in, so that they
are outliers, uniform and main ones again. Vectors along the inputs, subspaces, blocks of a
rotation and groups of main columns must then come to lie as they lay.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.spec import CodebookSpec

__all__ = ["Columns", "column_places", "share_sizes"]


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """A rank's stored columns `positions: [k]` of the whole, ascending; `spec` is the whole's.

    start: the first input feature of the rank.
    """

    spec: CodebookSpec
    positions: Tensor
    start: int

    @functools.cached_property
    def outliers(self) -> Tensor:
        """Numbers of its columns among the whole's outliers."""
        return self.positions[self.positions < self.spec.outlier_columns]

    @functools.cached_property
    def uniform(self) -> Tensor:
        """Numbers of its columns among the whole's uniform columns."""
        side = self.positions < self.spec.side_columns
        return self.positions[side][len(self.outliers) :] - self.spec.outlier_columns

    @functools.cached_property
    def main(self) -> Tensor:
        """Numbers of its columns among the whole's main columns."""
        first = len(self.outliers) + len(self.uniform)
        return self.positions[first:] - self.spec.side_columns

    @property
    def own_spec(self) -> CodebookSpec:
        """The format of the rank's matrix: the whole's, with its number of side columns."""
        side: dict[str, Any] = {
            "outlier_columns": len(self.outliers),
            "uniform_columns": len(self.uniform),
        }
        if not len(self.outliers):  # nor a codebook of outliers
            side |= {"outlier_entries": 0, "outlier_vector_length": 0}
        return dataclasses.replace(self.spec, **side)

    @property
    def exact(self) -> bool:
        """Whether the rank's main columns decode to what they are in the whole."""
        spec, main = self.spec, self.main
        place = torch.arange(len(main))
        if not len(main):
            return False
        for size in _blocks(spec):
            if not torch.equal(main, main[::size][place // size] // size * size + place % size):
                return False
        if spec.group_axis != "column":
            return True
        group = main // spec.group_size
        return torch.equal(group, group[:: spec.group_size][place // spec.group_size])

    def selected(self, name: str) -> tuple[int, Tensor] | None:
        """`(dim, index)` such that `whole.index_select(dim, index)` is the rank's part `name`.

        None for a part that every rank has whole.
        """
        spec = self.spec
        if name.startswith("codebook_"):
            sets = self.main[:: spec.group_size or 1] // (spec.group_size or 1)
            return (0, sets) if spec.group_axis == "column" else None
        if name in ("scale", "zero"):
            axis = spec.scale_axis if name == "scale" else spec.zero_axis
            return (0, self.start + torch.arange(len(self.positions))) if axis == "column" else None
        return {
            "codes": (1, self._cells()),
            "outliers": (1, self.outliers),
            "outlier_codes": (1, self.outliers),
            "uniform_codes": (1, self.uniform),
            "uniform_scale": (0, self.uniform),
            "uniform_zero": (0, self.uniform),
            "permutation": (0, self.positions),
        }.get(name)

    def _cells(self) -> Tensor:
        """Columns of the codes: padding lies in the last block, and goes with it."""
        if self.spec.vector_axis == "out":
            return self.main
        block = self.main[:: self.spec.vector_length * self.spec.stride]
        first = block // self.spec.vector_length  # = number of the block * stride
        return (first[:, None] + torch.arange(self.spec.stride)).flatten()


def _blocks(spec: CodebookSpec) -> list[int]:
    """Sizes of the blocks of main columns that must stay whole, and begin where blocks do."""
    sizes = []
    if spec.vector_axis == "in":
        # a block holds `stride` vectors; the next one must start at subspace 0 again
        cycle = spec.subspaces // math.gcd(spec.subspaces, spec.stride)
        sizes.append(spec.vector_length * spec.stride * cycle)
    if spec.rotation_size:
        sizes.append(spec.rotation_size)
    return sizes


def share_sizes(spec: CodebookSpec) -> list[list[int]]:
    """What to keep whole, as sizes of blocks of main columns, the finest choice first.

    A group of columns may be cut where each rank's columns are all of one group, as when 4 groups
    go to 8 ranks; where that doesn't come out, between groups.
    """
    blocks = _blocks(spec)
    return [blocks, [*blocks, spec.group_size]] if spec.group_axis == "column" else [blocks]


def column_places(spec: CodebookSpec, features: Tensor, sizes: Sequence[int]) -> list[int]:
    """Input features before which a cut leaves blocks of `sizes` whole, from 0 to k.

    `features: [k]`, int64: the input feature of each stored column. There is a main column
    between any two places.
    """
    k, main = len(features), features[spec.side_columns :]
    inside = torch.zeros(k + 2, dtype=torch.int64)
    for size in sizes:
        padding = main[-1].expand(-len(main) % size)
        block = torch.cat([main, padding]).reshape(-1, size)
        inside += torch.bincount(block.amin(1) + 1, minlength=k + 2)
        inside -= torch.bincount(block.amax(1) + 1, minlength=k + 2)
    free = inside.cumsum(0)[: k + 1] == 0
    before = torch.zeros(k + 1, dtype=torch.int64)  # main columns before each feature
    before[main + 1] = 1
    before = before.cumsum(0)
    places = [0]
    for place in free.nonzero()[:, 0].tolist():
        if before[place] > before[places[-1]] and before[place] < len(main):
            places.append(place)
    return [*places, k]
