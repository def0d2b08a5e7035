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
    limited: `[n, main]` float32, `matrix` with the weight's extremes limited; None: nothing is.
        A method gets one or the other as its `matrix`, see `training`.
    """

    matrix: Tensor
    weights: Tensor | None = None
    hessian: Tensor | None = None
    rows: Tensor | None = None
    limited: Tensor | None = None

    def vectors(self, spec: CodebookSpec) -> Vectors:
        """The vectors of each codebook of `spec`, with their weights.

        A cosine takes a vector as a whole: its weight is the mean of its coordinates' then.
        """
        found = split(spec, self.matrix, self.weights)
        if spec.distance == "cosine" and found.weights is not None and found.weights.ndim == 3:
            return dataclasses.replace(found, weights=found.weights.mean(-1))
        return found

    def training(self) -> Target:
        """What codebooks are trained on: this, or the limited weight where there is one."""
        if self.limited is None:
            return self
        return dataclasses.replace(self, matrix=self.limited, limited=None)

    def columns(self, which: slice | Tensor) -> Target:
        """Some of the columns, in the order of `which`."""

        def some(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else matrix[:, which]

        hessian = None if self.hessian is None else self.hessian[which][:, which]
        return Target(
            self.matrix[:, which], some(self.weights), hessian, self.rows, some(self.limited)
        )
