"""Vectors as sums of one entry of each stage's codebook: codes for them, and better codes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.quantize import beam
from vqkernels.quantize.kmeans import assign
from vqkernels.threads import all_threads

__all__ = ["Sums"]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Vectors and the codebooks that they are coded by.

    points: `[sets, count, length]` float64.
    books: `[sets, entries, length]` of each stage.
    weights: of squared errors, `[sets, count, length]`, `[sets, count]` or None.
    """

    points: Tensor
    books: list[Tensor]
    weights: Tensor | None

    def encode(self, width: int) -> Tensor:
        """Sums of one entry a stage near to the points, by a beam search that keeps `width`.

        Codes `[sets, count, stages]`.
        """
        with all_threads():
            if len(self.books) == 1:
                return assign(self.points, self.books[0], weights=self.weights)[..., None]
            found = beam.encode(self.points, self.books, weights=self.weights, beam=width)
        return torch.stack(found, dim=-1)

    def improve(self, known: Tensor, found: Tensor) -> Tensor:
        """The better of two codings, then each stage's code in turn the best for the others' sum.

        One round of iterated conditional modes (Besag 1986); no error is above that of `known`.
        """
        codes, error = self._better(known, self.errors(known), found)
        for stage, book in enumerate(self.books if len(self.books) > 1 else []):
            trial = codes.clone()
            rest = self.points - self._sums(codes) + _chosen(book, codes[..., stage])
            trial[..., stage] = self._nearest(stage, rest)
            codes, error = self._better(codes, error, trial)
        return codes

    def _nearest(self, stage: int, points: Tensor) -> Tensor:
        with all_threads():
            return assign(points, self.books[stage], weights=self.weights)

    def _better(self, codes: Tensor, error: Tensor, trial: Tensor) -> tuple[Tensor, Tensor]:
        found = self.errors(trial)
        better = found < error
        return torch.where(better[..., None], trial, codes), torch.where(better, found, error)

    def errors(self, codes: Tensor) -> Tensor:
        """Weighted squared error of each point: `[sets, count]` float64."""
        errors = (self.points - self._sums(codes)).square()
        if self.weights is None:
            return errors.sum(-1)
        if self.weights.ndim == 2:
            return errors.sum(-1) * self.weights
        return (errors * self.weights).sum(-1)

    def _sums(self, codes: Tensor) -> Tensor:
        """What the stages' codes stand for: `[sets, count, length]` float64."""
        total = torch.zeros_like(self.points)
        for stage in range(codes.shape[-1]):
            total += _chosen(self.books[stage], codes[..., stage])
        return total


def _chosen(book: Tensor, codes: Tensor) -> Tensor:
    return book[torch.arange(len(book))[:, None], codes].double()
