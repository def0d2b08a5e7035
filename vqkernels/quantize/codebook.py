"""What every method does with a codebook once it is found: round it as it is stored, and code.

Codes and residuals are always those of the stored entries, so a codebook's dtype costs only what
its entries lose, and never a code that another entry would have served better. Entries of int8
are trained as such: their scale is the one that costs least, and they are solved for anew with
the codes that the rounded ones get.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import UnsupportedError
from vqkernels.quantize.kmeans import assign
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.refit import refit

__all__ = ["Stage", "code_stage", "round_to", "rounded", "store", "stored_entries"]

# Scales that are tried for int8, as shares of the one that just holds the largest entry. A rare
# entry may be worth clamping; below this the clamped ones cost more than finer steps gain.
SHRINKAGES = tuple(1 - step / 32 for step in range(13))
# Rounds of codes and entries after rounding to int8, each of one more assignment.
ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, stored: `values: [books, entries, length]`, `codes: [books, count]` int64.

    scale: `[books]` float32, for int8 values.
    coefficient: the spec's factor of this stage.
    """

    values: Tensor
    scale: Tensor | None
    codes: Tensor
    coefficient: float = 1.0

    @property
    def entries(self) -> Tensor:
        """Entries as they decode: `[books, entries, length]` float32."""
        return stored_entries(self.values, self.scale, self.coefficient)

    def decode(self) -> Tensor:
        """The coded vectors: `[books, count, length]` float32."""
        entries = self.entries
        return entries[torch.arange(len(entries))[:, None], self.codes]


def store(vectors: Vectors, centroids: Tensor, dtype: str, *, coefficient: float = 1.0) -> Stage:
    """`centroids: [books, entries, length]` rounded to `dtype`, and the codes nearest to them.

    coefficient: stored are the centroids over it.

    Raises UnsupportedError where an entry is too large for `dtype`, or the coefficient is 0.
    """
    if dtype == "int8" and coefficient:
        return _trained_int8(vectors, centroids, coefficient)
    values, scale = rounded(centroids, dtype, coefficient=coefficient)
    codes = code_stage(vectors, stored_entries(values, scale, coefficient))
    return Stage(values, scale, codes, coefficient)


def rounded(
    centroids: Tensor, dtype: str, *, coefficient: float = 1.0, mass: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`centroids: [books, entries, length]` as `dtype` holds them, and int8's scale `[books]`.

    mass: weight of each entry's error, `[books, entries, 1 or length]`; None: all 1.

    Errors as for `store`.
    """
    if coefficient == 0:
        raise UnsupportedError("quantize: a stage's coefficient is 0; leave that stage out")
    entries = centroids / coefficient
    if dtype != "int8":
        return round_to(entries, dtype, "codebook_dtype"), None
    scale = _best_scale(entries, torch.ones(1) if mass is None else mass)
    return _steps(entries, scale).to(torch.int8), scale


def code_stage(vectors: Vectors, entries: Tensor) -> Tensor:
    """Codes of the entries nearest to the vectors: `[books, count]`."""
    return assign(vectors.points, entries, weights=vectors.weights)


def stored_entries(values: Tensor, scale: Tensor | None, coefficient: float = 1.0) -> Tensor:
    """Entries as they decode: float32."""
    entries = values.float() if scale is None else values.float() * scale[:, None, None]
    return entries * coefficient


def round_to(values: Tensor, dtype: str, field: str) -> Tensor:
    """`values` in the dtype that the spec's `field` names; UnsupportedError if one overflows."""
    rounded = values.to(getattr(torch, dtype))
    if not bool(torch.isfinite(rounded).all()):
        raise UnsupportedError(
            f"quantize: {field} {dtype} can't hold {float(values.abs().max()):.4g}, which this "
            f"weight needs; use bfloat16 or float32"
        )
    return rounded


def _trained_int8(vectors: Vectors, centroids: Tensor, coefficient: float) -> Stage:
    codes = code_stage(vectors, centroids)
    stage = _rounded_stage(vectors, centroids, codes, coefficient)
    for _ in range(ROUNDS):
        better = refit(vectors.points, [stage.codes], [stage.entries], weights=vectors.weights)[0]
        stage = _rounded_stage(vectors, better, stage.codes, coefficient)
    return stage


def _rounded_stage(vectors: Vectors, centroids: Tensor, codes: Tensor, coefficient: float) -> Stage:
    """Rounded to int8 for the vectors that have `codes`, and coded anew."""
    mass = _mass(codes, centroids, vectors.weights)
    values, scale = rounded(centroids, "int8", coefficient=coefficient, mass=mass)
    found = code_stage(vectors, stored_entries(values, scale, coefficient))
    return Stage(values, scale, found, coefficient)


def _best_scale(entries: Tensor, mass: Tensor) -> Tensor:
    """The scale of each book with the least squared error, weighted by `mass`: `[books]`."""
    largest = entries.abs().amax((1, 2)) / 127
    # an all-zero codebook has any scale; so has one too small to be divided by 127
    largest = torch.where(largest > 0, largest, 1.0)
    best, least = largest, np.full(len(entries), np.inf)
    for shrinkage in SHRINKAGES:
        scale = torch.where(largest * shrinkage > 0, largest * shrinkage, 1.0)
        lost = (_steps(entries, scale) * scale[:, None, None] - entries).double().square() * mass
        # numpy: torch's sum of a whole book rounds differently with the number of threads
        error = lost.numpy().sum((1, 2))
        best = torch.where(torch.from_numpy(error < least), scale, best)
        least = np.minimum(error, least)
    return best


def _steps(entries: Tensor, scale: Tensor) -> Tensor:
    return (entries / scale[:, None, None]).round().clamp(-127, 127)


def _mass(codes: Tensor, entries: Tensor, weights: Tensor | None) -> Tensor:
    """Weight of the vectors of each entry: `[books, entries, 1 or length]`, largest 1 in a book."""
    books, count = entries.shape[:2]
    flat = (codes + torch.arange(books)[:, None] * count).numpy().ravel()
    each = np.ones((codes.numel(), 1)) if weights is None else weights.reshape(codes.numel(), -1)
    sums = [np.bincount(flat, column, minlength=books * count) for column in np.asarray(each).T]
    mass = torch.from_numpy(np.stack(sums, axis=-1)).reshape(books, count, -1)
    return mass / mass.amax((1, 2), keepdim=True).clamp(min=1e-300)
