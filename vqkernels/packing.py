"""Codes as bitstreams: LSB first, straddling words, each row padded to 32 bits.

One cell of codes (all stages of a vector) takes `sum(bits)` consecutive bits, the first stage
in the low ones. It is VPTQ's packed layout for any number of stages and any widths up to 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vqkernels.errors import TensorError

__all__ = ["pack_codes", "packed_words", "unpack_codes"]


def packed_words(columns: int, bits: Sequence[int]) -> int:
    """32-bit words of one packed row of `columns` cells."""
    return math.ceil(columns * sum(bits) / 32)


def pack_codes(codes: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """Pack `codes: [rows, columns, stages]` into int32 words `[rows, packed_words]`.

    `bits` gives the width of each stage. Raises TensorError for a code that its width can't hold.
    """
    rows, columns, _ = codes.shape
    values = codes.numpy().astype(np.uint32)
    stream = np.zeros((rows, packed_words(columns, bits) * 32), np.uint8)
    cells = stream[:, : columns * sum(bits)].reshape(rows, columns, sum(bits))
    first = 0
    for stage, width in enumerate(bits):
        code = values[:, :, stage]
        if code.size and int(code.max()) >> width:
            raise TensorError(
                f"codes: stage {stage} holds {int(code.max())}, too large for {width} bits; "
                f"store it with more code_bits"
            )
        for bit in range(width):
            cells[:, :, first + bit] = (code >> np.uint32(bit)) & np.uint32(1)
        first += width
    words = np.packbits(stream, axis=1, bitorder="little").view("<u4")
    return torch.from_numpy(words.view(np.int32))


def unpack_codes(words: torch.Tensor, columns: int, bits: Sequence[int]) -> torch.Tensor:
    """Codes `[rows, columns, stages]` (uint8, or uint16 where a width exceeds 8) of `words`.

    The inverse of `pack_codes`. Raises TensorError where `words: [rows, packed_words]` int32
    has another shape or dtype than `columns` cells of `bits` need.
    """
    expected = packed_words(columns, bits)
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
        raise TensorError(
            f"codes: packed as {words.dtype} {list(words.shape)}, "
            f"but {columns} cells of {sum(bits)} bits need int32 [rows, {expected}]"
        )
    low: Any = words.contiguous().numpy().view(np.uint32)
    # each word with the next above it, so that a code of up to 16 bits lies in one number
    pairs = low.astype(np.uint64)
    pairs[:, :-1] |= low[:, 1:].astype(np.uint64) << np.uint64(32)
    dtype: Any = np.uint8 if max(bits) <= 8 else np.uint16
    codes = np.empty((words.shape[0], columns, len(bits)), dtype)
    first = np.arange(columns) * sum(bits)
    for stage, width in enumerate(bits):
        cells = np.take(pairs, first >> 5, axis=1)
        cells >>= (first & 31).astype(np.uint64)
        mask = np.uint64((1 << width) - 1)
        np.bitwise_and(cells, mask, out=codes[:, :, stage], casting="unsafe")
        first += width
    return torch.from_numpy(codes)
