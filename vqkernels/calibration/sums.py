"""Sums of x x^T over tokens in float64, the same bits on any number of threads."""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.threads import workers

__all__ = ["HELD", "Sums"]

# Inputs that are kept of those held out: 4 MB a layer of 4096.
HELD = 256
# Columns of X^T X that one thread works out; a narrower one reads X more often than it need.
TILE = 512
# Floats of the rows that are summed up together: 32 MB in float64.
CHUNK = 1 << 22


class Sums:
    """Sums of x x^T, or of x^2, and some inputs that are held out of them.

    k: inputs of the layer. full: whether x x^T is summed, `[k, k]`, or its diagonal alone.
    """

    def __init__(self, k: int, *, full: bool) -> None:
        self.k, self.full, self.count = k, full, 0
        self._total = torch.zeros((k, k) if full else (k,), dtype=torch.float64)
        self._held = torch.empty(0, k)
        self._order = np.empty(0)
        self._random = np.random.default_rng(0)

    def add(self, rows: Tensor, name: str) -> None:
        """Count in `rows: [tokens, k]`, on any device. Raises TensorError where one isn't finite.

        name: of the layer, for the message.
        """
        self._check(rows, name)
        step = max(1, CHUNK // self.k)
        with workers() as threads:
            for first in range(0, len(rows), step):
                self._add(rows[first : first + step].double(), threads)
        self.count += len(rows)

    def hold(self, rows: Tensor, name: str) -> None:
        """Keep some of `rows: [tokens, k]`: HELD of all that are held, each as likely."""
        self._check(rows, name)
        order = np.concatenate([self._order, self._random.random(len(rows))])
        keep = np.sort(order.argsort(kind="stable")[:HELD])
        old, new = keep[keep < len(self._order)], keep[keep >= len(self._order)]
        chosen = rows[torch.from_numpy(new - len(self._order)).to(rows.device)]
        self._held = torch.cat([self._held[torch.from_numpy(old)], chosen.float().cpu()])
        self._order = order[keep]

    def means(self) -> tuple[Tensor, Tensor | None]:
        """Mean of x^2, `[k]`, and of x x^T, `[k, k]`, or None: float32."""
        if not self.full:
            return (self._total / self.count).float(), None
        gram = (self._total / self.count).float()
        # tiles lie on and above the diagonal
        gram = gram.triu() + gram.triu(1).T
        return gram.diagonal().clone(), gram

    def held(self) -> Tensor | None:
        """The inputs that were kept, `[rows, k]` float32, in the order of the run."""
        return self._held if len(self._held) else None

    def _check(self, rows: Tensor, name: str) -> None:
        if rows.shape[-1] != self.k:
            raise TensorError(
                f"{name}: inputs of {rows.shape[-1]}, but the layer has {self.k}; check the model"
            )
        if not bool(torch.isfinite(rows).all()):
            raise TensorError(
                f"{name}: its input holds NaN or infinity; run the model in float32 or bfloat16"
            )

    def _add(self, rows: Tensor, threads: Executor) -> None:
        if not self.full:
            self._total += rows.square().sum(0).cpu()
            return
        cuts = range(0, self.k, TILE)

        def tile(corner: tuple[int, int]) -> None:
            i, j = (slice(first, first + TILE) for first in corner)
            self._total[i, j] += (rows[:, i].T @ rows[:, j]).cpu()

        # all at once: `map` raises here what a thread raised
        list(threads.map(tile, [(i, j) for i in cuts for j in cuts if i <= j]))
