"""What a sample of a layer's vectors reaches of it, and a warning where that is too little."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vqkernels.parts import code_grid
from vqkernels.quantize.layout import Vectors
from vqkernels.spec import CodebookSpec

__all__ = [
    "NORMS",
    "Coverage",
    "CoverageWarning",
    "coverage",
    "measures",
    "reached",
    "shares",
    "together",
    "warn",
]

# Vectors that each band of channels gets: so many strata of norms.
NORMS = 16
# What a sample needs for each entry: at 10, books of MiniLM's 1536 x 384 layer have 9.7 % more
# distortion than those trained on all vectors.
PER_ENTRY = 10
# What it may miss: of the weighted squared norms, those past its longest vector; and of the
# channels, in stretches of a 64th (a head of many language models) or as fine as NORMS allows.
BEYOND, UNREACHED, STRETCHES = 0.05, 0.1, 64
# Vectors whose norms are found together: 16 MiB of float64 at a length of 8.
CHUNK = 1 << 18

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class CoverageWarning(UserWarning):
    """A sample that does not stand for its layer."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What a sample reaches of a layer, in the worst of the books that it doesn't hold whole.

    per_entry: vectors in the sample for each entry of the largest stage; inf where all are in it.
    beyond: share of the weighted squared norms that is in vectors past the sample's largest.
    unreached: share of the stretches of channels (output rows for vectors along `in`, input
        columns for vectors along `out`) that the sample has no vector of.
    """

    per_entry: float
    beyond: float
    unreached: float

    def problems(self) -> list[str]:
        """What the sample misses, in words; nothing where it covers the layer."""
        found = []
        if self.per_entry < PER_ENTRY:
            found.append(f"{self.per_entry:.3g} vectors an entry, of {PER_ENTRY} needed")
        if self.beyond > BEYOND:
            found.append(f"{self.beyond:.0%} of the squared norms are past its longest vector")
        if self.unreached > UNREACHED:
            found.append(f"{self.unreached:.0%} of the channels have no vector in it")
        return found


def coverage(vectors: Vectors, sampled: Vectors, spec: CodebookSpec, n: int, k: int) -> Coverage:
    """What `sampled`, some of `vectors`, reaches of an `[n, k]` layer.

    Warns where that is too little: a CoverageWarning of one line. Vectors of weight 0 don't count.
    """
    found = reached(vectors, sampled, spec, n, k)
    warn(found, f"the {n} x {k} layer")
    return found


def measures(vectors: Vectors) -> tuple[Floats, Floats]:
    """Weight and weighted squared norm of each vector: `[books, count]`; filling has weight 0."""
    books, count, _ = vectors.points.shape
    points = vectors.points.detach().cpu().numpy()
    weights = None if vectors.weights is None else vectors.weights.detach().cpu().numpy()
    mass, spent = np.ones((books, count)), np.empty((books, count))
    step = max(1, CHUNK // books)
    for part in (slice(first, first + step) for first in range(0, count, step)):
        squares = points[:, part].astype(np.float64) ** 2
        if weights is None:
            spent[:, part] = squares.sum(-1)
            continue
        each = weights[:, part].astype(np.float64).reshape(books, squares.shape[1], -1)
        mass[:, part] = each.mean(-1)
        spent[:, part] = (squares * each).sum(-1)
    return mass, spent


def shares(values: Floats) -> Floats:
    """Each value over its book's sum; 0 where that is 0."""
    total = values.sum(1, keepdims=True)
    found: Floats = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    return found


def reached(vectors: Vectors, sampled: Vectors, spec: CodebookSpec, n: int, k: int) -> Coverage:
    """As `coverage`, without a warning."""
    columns = code_grid(spec, n, k)[1]
    cells = vectors.cells.numpy()
    mass, spent = measures(vectors)
    flags = np.zeros(int(cells.max()) + 2, np.bool_)  # one more: where cell -1, filling, ends up
    flags[sampled.cells.numpy().ravel()] = True
    drawn = flags[cells] & (mass > 0)
    channels = cells // columns if spec.vector_axis == "in" else cells % columns
    counts = drawn.sum(1)
    whole = counts == (mass > 0).sum(1)
    largest = np.where(drawn, spent, 0).max(1, keepdims=True)
    past = np.where(spent > largest, shares(spent), 0).sum(1)
    return Coverage(
        float(np.where(whole, np.inf, counts).min()) / spec.max_entries,
        float(past.max()),
        max(_unreached(*book) for book in zip(channels, mass > 0, drawn, strict=True)),
    )


def _unreached(channels: Ints, some: Bools, drawn: Bools) -> float:
    """Share of the stretches of channels with vectors in `some` that `drawn` has none of."""
    present, number = np.unique(channels[some], return_inverse=True)
    if not len(present):
        return 0.0
    stretches = min(STRETCHES, len(present), max(1, int(drawn.sum()) // NORMS))
    stretch = number * stretches // len(present)
    return 1 - len(np.unique(stretch[drawn[some]])) / len(np.unique(stretch))


def together(layers: Sequence[Coverage], kept: Vectors, spec: CodebookSpec) -> Coverage:
    """Of books that all layers train together: their vectors add up, what is missed doesn't."""
    whole = all(math.isinf(layer.per_entry) for layer in layers)
    fewest = int((kept.cells >= 0).sum(1).min())
    return Coverage(
        math.inf if whole else fewest / spec.max_entries,
        max(layer.beyond for layer in layers),
        max(layer.unreached for layer in layers),
    )


def warn(found: Coverage, what: str) -> None:
    """Warn, for the caller's caller, of what is missed of `what`."""
    if problems := found.problems():
        warnings.warn(
            f"the sample doesn't cover {what}: {'; '.join(problems)}; sample more vectors",
            CoverageWarning,
            stacklevel=3,
        )
