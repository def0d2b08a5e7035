"""How the parts of a matrix lie in a container.

Part `p` of matrix `name` is the tensor `<name>/<p>`, as `part_table` gives it, except that codes
are packed (`packing`): int32 `[rows, packed_words]`, or of the transposed grid where the format's
traversal is by column.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.packing import pack_codes, packed_words, unpack_codes
from vqkernels.parts import Part, code_grid
from vqkernels.source import Outline
from vqkernels.spec import CodebookSpec

__all__ = ["DTYPES", "pack", "stored_table", "unpack"]

# What safetensors calls the dtypes of stored parts.
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.int8: "I8",
}

_PIECE = 1 << 21  # code bits worked on at once


def stored_table(outline: Outline) -> dict[str, Part]:
    """The parts of a matrix as they lie in a file, in order."""
    table, spec = outline.table(), outline.spec
    rows, columns = code_grid(spec, outline.n, outline.k)
    if spec.traversal == "column":
        rows, columns = columns, rows
    shape = (rows, packed_words(columns, spec.code_bits))
    table["codes"] = dataclasses.replace(table["codes"], shape=shape, dtype=torch.int32)
    return table


def pack(codes: Tensor, spec: CodebookSpec) -> Tensor:
    """`codes: [rows, columns, stages]` as int32 words, `[rows, packed_words]`."""
    grid = codes.transpose(0, 1) if spec.traversal == "column" else codes
    # packing spreads each bit over a byte, so a few rows at a time
    step = max(1, _PIECE // (grid.shape[1] * spec.vector_bits))
    return torch.cat([pack_codes(piece, spec.code_bits) for piece in torch.split(grid, step)])


def unpack(words: Tensor, spec: CodebookSpec, part: Part, where: str) -> Tensor:
    """Codes as `part` has them; their range is checked first, which a narrower dtype would hide.

    Raises TensorError, which starts with `where`.
    """
    columns = part.shape[0] if spec.traversal == "column" else part.shape[1]
    step = max(1, _PIECE // (columns * spec.vector_bits))
    pieces = []
    for piece in torch.split(words, step):
        codes = unpack_codes(piece, columns, spec.code_bits)
        if (top := int(codes.to(torch.int32).max())) >= part.limit:
            raise TensorError(
                f"{where}: codes reach {top}, but the largest codebook has {part.limit} entries; "
                f"the file was made for another codebook: quantise again"
            )
        pieces.append(codes.to(part.dtype))
    grid = torch.cat(pieces)
    return grid.transpose(0, 1).contiguous() if spec.traversal == "column" else grid
