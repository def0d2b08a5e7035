"""Problem: what is asked of a kernel, apart from how it is done."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from vqkernels.parts import effective_bits
from vqkernels.spec import CodebookSpec

__all__ = ["Dtype", "Problem"]

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """`y[m, n] = x[m, k] @ decode(W)[n, k].T (+ bias)` with W stored in `spec`.

    dtype: of x and y. The floors are the problem's own, whichever kernel solves it: each byte
    that is stored read once, and the multiplications of a dense product.
    """

    m: int
    n: int
    k: int
    spec: CodebookSpec
    op: Literal["linear"] = "linear"
    dtype: Dtype = "float32"
    bias: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of x and y as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def rounded_to(self) -> str | None:
        """dtype that x is rounded to once more before it meets the codebooks, if it is.

        A column scale or a rotation changes x, and half-precision kernels take the result in x's
        dtype.
        """
        changed = self.spec.scale_axis == "column" or self.spec.rotation_size > 0
        return self.dtype if changed and self.dtype != "float32" else None

    @property
    def flops(self) -> int:
        """Operations of the dense product, 2mnk."""
        return 2 * self.m * self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, codebooks and side tensors as stored, each once."""
        bits = effective_bits([(self.spec, self.n, self.k)])
        return math.ceil((bits.index + bits.codebook + bits.side) / 8)

    @property
    def activation_bytes(self) -> int:
        """Bytes of x, y and the bias, each once."""
        biases = self.n if self.bias else 0
        return (self.m * (self.k + self.n) + biases) * self.torch_dtype.itemsize

    @property
    def bytes(self) -> int:
        """The byte floor: stored weight, x and y, each moved once."""
        return self.weight_bytes + self.activation_bytes
