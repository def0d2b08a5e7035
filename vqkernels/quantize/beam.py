"""Beam search: for each vector, the sum of one entry a stage that comes nearest to it.

Babenko and Lempitsky 2014 ("Additive quantization for extreme vector compression"), as residual
quantizers use it: of all sums of the first stages' entries the `beam` best are kept, and each is
tried with every entry of the next stage. One candidate is greedy coding; as many as there are
sums before the last stage is an exhaustive search.

Residuals, not tables of inner products, are carried from stage to stage: a table's terms cancel
where the residual is small against the vector (in float32, from a thousandth on), and its lookups
cost as much as a product of vectors of 8 does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.threads import workers

__all__ = ["encode"]

# Floats of one tile of scores: 1 MiB, the L2 of a server core.
TILE = 1 << 18
# Entries that a tile goes over at once.
TILE_ENTRIES = 1024
# Kept sums whose residuals are at hand at once: a few MiB, and 0.1 ms or more for each operation.
SUMS = 1 << 15


def encode(
    points: Tensor, codebooks: Sequence[Tensor], *, weights: Tensor | None = None, beam: int
) -> list[Tensor]:
    """Codes of each stage, `[books, count]` int64, for `points: [books, count, length]`.

    codebooks: of each stage, `[books, entries, length]`.
    weights: `[books, count]`, which change nothing, or `[books, count, length]`.
    beam: sums that are kept for each vector between stages.

    The same bits on any number of threads. Raises TensorError for shapes that don't fit.
    """
    _check(points, codebooks, weights, beam)
    books, count, _ = points.shape
    codes = torch.empty(len(codebooks), books, count, dtype=torch.int64)
    with workers() as pool:
        search = _Search.of(points, codebooks, weights, beam)

        def code(tile: tuple[slice, slice]) -> None:
            codes[:, *tile] = search.codes(*tile)

        for _ in pool.map(code, search.tiles()):
            pass
    return list(codes)


def _check(points: Tensor, codebooks: Sequence[Tensor], weights: Tensor | None, beam: int) -> None:
    if beam < 1 or not codebooks:
        raise TensorError(f"beam search: beam {beam}, {len(codebooks)} stages; give 1 at least")
    if points.ndim != 3:
        raise TensorError(f"beam search: points {list(points.shape)}; give [books, count, length]")
    books, count, length = points.shape
    for stage, entries in enumerate(codebooks):
        if entries.ndim != 3 or (entries.shape[0], entries.shape[2]) != (books, length):
            raise TensorError(
                f"beam search: codebook {stage} is {list(entries.shape)}; "
                f"give [{books}, entries, {length}]"
            )
    if weights is not None and weights.shape not in (points.shape, (books, count)):
        raise TensorError(
            f"beam search: weights {list(weights.shape)} for points {list(points.shape)}; give one "
            f"a point or one a coordinate"
        )


@dataclasses.dataclass(frozen=True)
class _Search:
    """Points and codebooks shifted and scaled, so that float32 products of them are accurate.

    points: `[books, count, length]`, at most about 1, their mean at 0.
    weights: of each coordinate, or None where all are equal.
    codebooks: of each stage, in the points' scale; the points' shift is in the first.
    tables: of each stage `[books, columns, entries]`: `rows @ table` are squared errors.
    """

    points: Tensor
    weights: Tensor | None
    codebooks: list[Tensor]
    tables: list[Tensor]
    beam: int

    @classmethod
    def of(
        cls, points: Tensor, codebooks: Sequence[Tensor], weights: Tensor | None, beam: int
    ) -> _Search:
        points = points.detach().cpu().float()
        exponent = _exponent(points)
        points = points.double() * torch.exp2(-exponent)
        mean = points.mean(1, keepdim=True)
        entered = [
            (book.detach().cpu().double() * torch.exp2(-exponent) - (0 if stage else mean)).float()
            for stage, book in enumerate(codebooks)
        ]
        each = None
        if weights is not None and weights.ndim == 3:
            each = weights.detach().cpu().float()
            each = each * torch.exp2(-_exponent(each)).float()
        tables = [_table(book, each is not None) for book in entered]
        return cls((points - mean).float(), each, entered, tables, beam)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Slices of books and of points that are coded at once."""
        books, count, _ = self.points.shape
        height = max(1, SUMS // max(self._kept()))
        together = max(1, height // count)
        for first in range(0, books, together):
            for start in range(0, count, height):
                yield slice(first, first + together), slice(start, start + height)

    def _kept(self) -> list[int]:
        """Sums that are kept before each stage."""
        kept = [1]
        for book in self.codebooks[:-1]:
            kept.append(min(self.beam, kept[-1] * book.shape[1]))
        return kept

    def codes(self, books: slice, points: slice) -> Tensor:
        """Codes of every stage of one tile: `[stages, books, count]`."""
        left = self.points[books, points, None]
        weights = None if self.weights is None else self.weights[books, points, None]
        chosen: list[Tensor] = []
        which = torch.arange(len(left))[:, None, None]
        keep = [*self._kept()[1:], 1]
        for book, table, kept in zip(self.codebooks, self.tables, keep, strict=True):
            parent, code = _best(_rows(left, weights), table[books], kept)
            chosen = [before.gather(2, parent) for before in chosen] + [code]
            index = parent[..., None].expand(*parent.shape, left.shape[-1])
            left = left.gather(2, index) - book[books][which, code]
        return torch.stack(chosen)[..., 0]


def _exponent(values: Tensor) -> Tensor:
    """A power of two (exact to multiply with) that brings each book to about 1: `[books, 1, 1]`."""
    _, exponent = torch.frexp(values.abs().amax((1, 2), keepdim=True))
    return exponent.double()


def _table(book: Tensor, by_coordinate: bool) -> Tensor:
    """Columns of `-2 c`, `c^2` (a sum of them, or each) and 1."""
    squares = book.square() if by_coordinate else book.square().sum(-1, keepdim=True)
    columns = [-2 * book, squares, torch.ones(*book.shape[:2], 1)]
    return torch.cat(columns, dim=-1).transpose(1, 2).contiguous()


def _rows(left: Tensor, weights: Tensor | None) -> Tensor:
    """What goes with `_table`, for residuals `left: [books, count, kept, length]`."""
    ones = torch.ones(*left.shape[:-1], 1)
    if weights is None:
        return torch.cat([left, ones, left.square().sum(-1, keepdim=True)], dim=-1)
    weighed = left * weights
    error = (weighed * left).sum(-1, keepdim=True)
    return torch.cat([weighed, weights.expand(left.shape), error], dim=-1)


def _best(rows: Tensor, table: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` best pairs of a kept sum and an entry: each `[books, count, keep]` int64."""
    books, count, kept, _ = rows.shape
    entries = table.shape[-1]
    pairs = np.empty((books, count, min(keep, kept * entries)), np.int64)
    width = kept * min(entries, TILE_ENTRIES)
    height = min(count, max(1, TILE // width))
    together = max(1, TILE // (width * height))
    for first in range(0, books, together):
        some = slice(first, first + together)
        for start in range(0, count, height):
            tile = slice(start, start + height)
            pairs[some, tile] = _best_of_tile(rows[some, tile], table[some], keep)
    chosen = torch.from_numpy(pairs)
    return chosen // entries, chosen % entries


def _best_of_tile(rows: Tensor, table: Tensor, keep: int) -> npt.NDArray[np.int64]:
    """The best pairs, numbered `sum * entries + entry`: `[books, count, keep]`."""
    books, count, kept, columns = rows.shape
    flat = rows.reshape(books, count * kept, columns)
    entries = table.shape[-1]
    found: list[npt.NDArray[np.int64]] = []
    scores: list[npt.NDArray[np.float32]] = []
    for first in range(0, entries, TILE_ENTRIES):
        tile = torch.bmm(flat, table[..., first : first + TILE_ENTRIES]).numpy()
        width = tile.shape[-1]
        tile = tile.reshape(books, count, kept * width)
        best = _lowest(tile, keep)
        if width == entries:
            return best
        scores.append(np.take_along_axis(tile, best, axis=-1))
        found.append(best // width * entries + best % width + first)
    best = _lowest(np.concatenate(scores, axis=-1), keep)
    return np.take_along_axis(np.concatenate(found, axis=-1), best, axis=-1)


def _lowest(scores: npt.NDArray[np.float32], keep: int) -> npt.NDArray[np.int64]:
    """Where the `keep` lowest of the last axis are, in no order; the first where one is asked."""
    if keep == 1:
        lowest: npt.NDArray[np.int64] = scores.argmin(axis=-1, keepdims=True)
        return lowest
    if keep >= scores.shape[-1]:
        return np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    return np.argpartition(scores, keep - 1, axis=-1)[..., :keep]
