"""SHA-256 of what is stored and of what it dequantises to."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = ["decoded_sha256", "raw_bytes", "sha256"]

_PIECE = 1 << 21  # weights worked on at once: 16 MB in float64
_MAX_PIECE = 1 << 29  # 4 GB; only codebook groups of very many rows come near it


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    # of an axis of one torch keeps any stride, and bytes need 1
    flat = tensor.reshape(-1).as_strided((tensor.numel(),), (1,))
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def sha256(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a contiguous tensor on the CPU, in hexadecimal."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def decoded_sha256(tensor: QuantizedTensor, where: str) -> str:
    """SHA-256 of the stored weight in float32, taken over pieces of rows to bound memory.

    Raises TensorError, which starts with `where`, for a weight that is not finite.
    """
    cut = row_step(tensor.spec)
    if min(cut, tensor.n) * tensor.k > _MAX_PIECE:
        raise TensorError(
            f"{where}: groups of {cut} rows and {tensor.k} columns are too large to check; "
            f"use a smaller group_size"
        )
    step = cut * math.ceil(_PIECE / (cut * tensor.k))
    digest = hashlib.sha256()
    for start in range(0, tensor.n, step):
        rows = tensor.rows(start, min(start + step, tensor.n))
        values = rows.stored_weight(torch.float64).to(torch.float32).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise TensorError(f"{where}: dequantises to infinity; check scales and coefficients")
        digest.update(raw_bytes(values))
    return digest.hexdigest()
