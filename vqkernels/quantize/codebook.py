"""What every method does with a codebook once it is found: round it as it is stored, and code.

Codes and residuals are always those of the stored entries, so a codebook's dtype costs only what
its entries lose, and never a code that another entry would have served better.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.errors import UnsupportedError
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.layout import Vectors

__all__ = ["Stage", "code_stage", "round_to", "rounded", "store", "stored_entries"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, stored: `values: [books, entries, length]`, `codes: [books, count]` int64.

    scale: `[books]` float32, for int8 values.
    """

    values: Tensor
    scale: Tensor | None
    codes: Tensor

    def decode(self) -> Tensor:
        """The coded vectors: `[books, count, length]` float32."""
        entries = stored_entries(self.values, self.scale)
        return entries[torch.arange(len(entries))[:, None], self.codes]


def store(vectors: Vectors, centroids: Tensor, dtype: str) -> Stage:
    """`centroids: [books, entries, length]` rounded to `dtype`, and the codes nearest to them.

    Raises UnsupportedError where an entry is too large for `dtype`.
    """
    values, scale = rounded(centroids, dtype)
    return Stage(values, scale, code_stage(vectors, stored_entries(values, scale)))


def rounded(centroids: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """`centroids: [books, entries, length]` as stored, and the scale `[books]` of int8 entries."""
    if dtype != "int8":
        return round_to(centroids, dtype, "codebook_dtype"), None
    largest = centroids.abs().amax((1, 2))
    # an all-zero codebook has any scale; so has one too small to be divided by 127
    scale = torch.where(largest / 127 > 0, largest / 127, 1.0)
    return (centroids / scale[:, None, None]).round().clamp(-127, 127).to(torch.int8), scale


def code_stage(vectors: Vectors, entries: Tensor) -> Tensor:
    """Codes of the entries nearest to the vectors: `[books, count]`."""
    return assign(vectors.points, entries, weights=vectors.weights)


def stored_entries(values: Tensor, scale: Tensor | None) -> Tensor:
    """Entries as they decode: float32."""
    return values.float() if scale is None else values.float() * scale[:, None, None]


def round_to(values: Tensor, dtype: str, field: str) -> Tensor:
    """`values` in the dtype that the spec's `field` names; UnsupportedError if one overflows."""
    rounded = values.to(getattr(torch, dtype))
    if not bool(torch.isfinite(rounded).all()):
        raise UnsupportedError(
            f"quantize: {field} {dtype} can't hold {float(values.abs().max()):.4g}, which this "
            f"weight needs; use bfloat16 or float32"
        )
    return rounded
