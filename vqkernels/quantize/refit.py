"""All stages' codebooks at once, by least squares, for codes that stay as they are.

Babenko and Lempitsky 2014; Martinez, Clement, Hoos and Little 2016 ("Revisiting additive
quantization"). The normal matrix counts, for each pair of codes, how often they meet. Where it is
small it is factored; a codebook of 65,536 entries would make it 34 GB, and conjugate gradients
apply it by way of the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqkernels.threads import one_thread

__all__ = ["decode", "refit", "revive", "squared_errors"]

Floats = npt.NDArray[np.float64]

# Of a normal matrix's largest element: keeps what the codes leave open (unused codes, shifts from
# one stage to another) where it was, and moves nothing else by more than this.
RIDGE = 1e-9
# A factored normal matrix has at most so many rows (8 MiB), and so many elements a vector: past
# that, conjugate gradients are quicker.
DENSE_ROWS = 1024
DENSE_PER_VECTOR = 16
# Conjugate gradients end here, or where the residual is a millionth.
STEPS = 60
TOLERANCE = 1e-6


def refit(
    points: Tensor,
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Codebooks `[books, entries, length]` float32 with the least weighted squared error.

    points: `[books, count, length]`; codes: of each stage `[books, count]`.
    codebooks: of each stage, what unused entries keep.
    weights: `[books, count]`, `[books, count, length]` or None (all 1).
    """
    with one_thread():
        system = _System.of(points, codes, codebooks, weights)
        moved = system.factored() if system.is_small else system.by_gradients()
    cuts = np.cumsum([book.shape[1] for book in codebooks])[:-1]
    return [
        (book.detach().cpu().double() + torch.from_numpy(change)).float()
        for book, change in zip(codebooks, np.split(moved, cuts, axis=1), strict=True)
    ]


def revive(
    points: Tensor,
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Codebooks whose unused entries complete the worst coded vectors, one vector an entry.

    Shapes as for `refit`. Each book's unused entries, stage after stage, take its vectors in the
    order of their errors; where a vector has none, the entry stays.
    """
    revived = [book.clone() for book in codebooks]
    used = [
        _used(code, book.shape[1], weights) for code, book in zip(codes, codebooks, strict=True)
    ]
    waiting = np.flatnonzero(~np.concatenate(used, axis=1).all(1))
    if not len(waiting):
        return list(codebooks)
    revived = [book.clone() for book in codebooks]
    left = points - decode(codes, codebooks)
    errors = squared_errors(left, weights)
    for book in waiting.tolist():
        error = errors[book]
        worst = iter(error.argsort(descending=True, stable=True).tolist())
        for stage, entries in enumerate(revived):
            for entry in np.flatnonzero(~used[stage][book]).tolist():
                vector = next(worst, None)
                if vector is None or not error[vector] > 0:
                    break
                code = codes[stage][book, vector]
                entries[book, entry] = codebooks[stage][book, code] + left[book, vector]
    return revived


def squared_errors(left: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted squared norms `[books, count]` float64 of what codes leave of their vectors."""
    # numpy, here and below: torch hands even these to threads, whose barriers cost more than that
    exact = left.numpy().astype(np.float64)
    if weights is not None and weights.ndim == 3:
        return torch.from_numpy(np.einsum("bnl,bnl,bnl->bn", exact, exact, weights.numpy()))
    squares = np.einsum("bnl,bnl->bn", exact, exact)
    return torch.from_numpy(squares if weights is None else squares * weights.numpy())


def decode(codes: Sequence[Tensor], codebooks: Sequence[Tensor]) -> Tensor:
    """Sums of the coded entries: `[books, count, length]`."""
    which = np.arange(len(codes[0]))[:, None]
    total = codebooks[0].numpy()[which, codes[0].numpy()]
    for code, book in zip(codes[1:], codebooks[1:], strict=True):
        total += book.numpy()[which, code.numpy()]
    return torch.from_numpy(total)


def _used(codes: Tensor, entries: int, weights: Tensor | None) -> npt.NDArray[np.bool_]:
    """Whether a vector that counts has each code: `[books, entries]`."""
    used = np.zeros((len(codes), entries), np.bool_)
    book, vector = np.indices(codes.shape)
    if weights is not None:
        counts = (weights > 0).reshape(*codes.shape, -1).any(-1).numpy()
        book, vector = book[counts], vector[counts]
    used[book, codes.numpy()[book, vector]] = True
    return used


@dataclasses.dataclass(frozen=True)
class _System:
    """Normal equations of each book and coordinate, for the change of the codebooks.

    left: `[length, books, count]`, what the codebooks leave of the vectors.
    weights: `[length or 1, books, count]`, at most 1; one row where coordinates weigh the same.
    rows: of each stage `[books, count]`, its codes as rows of the book's normal matrix.
    total: rows of a normal matrix.
    """

    left: Floats
    weights: Floats
    rows: list[npt.NDArray[np.int64]]
    total: int

    @classmethod
    def of(
        cls,
        points: Tensor,
        codes: Sequence[Tensor],
        codebooks: Sequence[Tensor],
        weights: Tensor | None,
    ) -> _System:
        books = [book.detach().cpu().double() for book in codebooks]
        left = points.detach().cpu().double() - decode(codes, books)
        mass = torch.ones(points.shape[:2]) if weights is None else weights.detach().cpu()
        mass = mass.reshape(*points.shape[:2], -1).double()
        mass = mass / mass.amax((1, 2), keepdim=True).clamp(min=1e-300)
        starts = np.cumsum([0, *(book.shape[1] for book in codebooks)])
        return cls(
            left.permute(2, 0, 1).contiguous().numpy(),
            mass.permute(2, 0, 1).contiguous().numpy(),
            [code.numpy() + start for code, start in zip(codes, starts[:-1], strict=True)],
            int(starts[-1]),
        )

    @property
    def is_small(self) -> bool:
        # with one stage the matrix is diagonal, and one step of gradients solves it
        several, count = len(self.rows) > 1, self.left.shape[2]
        return several and self.total <= DENSE_ROWS and self.total**2 <= DENSE_PER_VECTOR * count

    def factored(self) -> Floats:
        """The change `[books, total, length]`, by Cholesky's factorisation."""
        length, books, _ = self.left.shape
        moved = np.empty((books, self.total, length))
        for book in range(books):
            right = np.stack([self._gathered(self._pulls(j, book), book) for j in range(length)], 1)
            normals = torch.from_numpy(
                np.stack([self._normal(weights[book], book) for weights in self.weights])
            )
            factors = torch.linalg.cholesky(normals)
            # one system for all coordinates, or one for each
            sides = right[None] if len(normals) == 1 else right.T[..., None]
            found = torch.cholesky_solve(torch.from_numpy(np.ascontiguousarray(sides)), factors)
            moved[book] = found[0] if len(normals) == 1 else found[..., 0].T
        return moved

    def _pulls(self, coordinate: int, book: int) -> Floats:
        weights = self.weights[coordinate if len(self.weights) > 1 else 0]
        pulls: Floats = weights[book] * self.left[coordinate, book]
        return pulls

    def _gathered(self, values: Floats, book: int) -> Floats:
        """Sums of `values: [count]` over the vectors of each code: `[total]`."""
        sums = np.zeros(self.total)
        for rows in self.rows:
            sums += np.bincount(rows[book], values, minlength=self.total)
        return sums

    def _normal(self, weights: Floats, book: int) -> Floats:
        flat = np.zeros(self.total**2)
        for first in self.rows:
            for second in self.rows:
                pairs = first[book] * self.total + second[book]
                flat += np.bincount(pairs, weights, minlength=self.total**2)
        normal = flat.reshape(self.total, self.total)
        diagonal = normal.diagonal().copy()
        np.fill_diagonal(normal, diagonal + RIDGE * max(diagonal.max(), 1e-300))
        return normal

    def by_gradients(self) -> Floats:
        """The change `[books, total, length]`, by conjugate gradients, one coordinate at a time."""
        columns = [
            self._solved(left, self.weights[j if len(self.weights) > 1 else 0])
            for j, left in enumerate(self.left)
        ]
        return np.stack(columns, axis=-1)

    def _solved(self, left: Floats, weights: Floats) -> Floats:
        """One coordinate's change in every book, `[books, total]`; preconditioned by counts."""
        books = len(left)
        offsets = np.arange(books)[:, None] * self.total
        flat = [(rows + offsets).ravel() for rows in self.rows]

        def gathered(values: Floats) -> Floats:
            sums = np.zeros(books * self.total)
            for rows in flat:
                sums += np.bincount(rows, values, minlength=len(sums))
            return sums.reshape(books, self.total)

        mass = weights.ravel()
        counts = gathered(mass)
        inverse = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
        residual = gathered(mass * left.ravel())
        solution = np.zeros_like(residual)
        direction = preconditioned = inverse * residual
        size = (residual * preconditioned).sum(1, keepdims=True)
        enough = TOLERANCE**2 * size
        for _ in range(STEPS):
            if bool((size <= enough).all()):
                break
            spread = direction.ravel()
            image = gathered(mass * sum(spread[rows] for rows in flat))
            step = _ratio(size, (direction * image).sum(1, keepdims=True))
            solution = solution + step * direction
            residual = residual - step * image
            preconditioned = inverse * residual
            before, size = size, (residual * preconditioned).sum(1, keepdims=True)
            direction = preconditioned + _ratio(size, before) * direction
        return solution


def _ratio(above: Floats, below: Floats) -> Floats:
    """A quotient that is 0 where a book is solved already."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
