"""Target: what the codebooks of a weight have to come near, and how errors count."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from vqkernels.quantize.layout import Vectors, split
from vqkernels.spec import CodebookSpec

__all__ = ["Target"]


@dataclasses.dataclass(frozen=True)
class Target:
    """The main columns as the codebooks see them: permuted, scaled, rotated, sides left out.

    matrix: `[n, main]` float32, on the CPU.
    weights: of each squared error, `[n, main]` or None (all 1). With a full Hessian: its diagonal
        times `rows`.
    hessian: `[main, main]` float32 or None: the error is then `sum_r rows[r] * e_r H e_r^T` over
        the rows e_r of `matrix - decoded`.
    rows: `[n]` float32, factor of each row's error; None: all 1.
    """

    matrix: Tensor
    weights: Tensor | None = None
    hessian: Tensor | None = None
    rows: Tensor | None = None

    def vectors(self, spec: CodebookSpec) -> Vectors:
        """The vectors of each codebook of `spec`, with their weights."""
        return split(spec, self.matrix, self.weights)
