"""What is stored of a matrix: its parts as they lie in a file.

Part `p` of matrix `name` is the tensor `<name>/<p>`, as `part_table` gives it, except that instead
of the codes `[rows, columns, stages]` there are

    codes: int32 `[rows, packed_words]`, the bitstream of `packing` over the stages that are coded
        `packed`; missing where there is none
    ans_<s>: uint32 `[words]`, the stream of `entropy`, for each stage `s` that is coded `ans`
    usage_<s>: `[entries]`, how often each entry of stage `s` is used, over all codebooks of the
        stage; uint8, uint16 or uint32, the first that holds the largest count. For every stage
        or none, as the matrix's `usage` says, and for each stage that is coded `ans`

Codes and streams are of the grid as part_table has it, or of the transposed one, `[columns, rows,
stages]`, where the format's traversal is by column; a stream takes its cells row after row. It has
a word for every 64 codes at least, and the grid fewer than 2^31 cells: so a small file can't ask
for much memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from vqkernels.container.manifest import TensorInfo
from vqkernels.packing import packed_words
from vqkernels.parts import code_grid
from vqkernels.source import Outline
from vqkernels.spec import CodebookSpec

__all__ = [
    "CODES_PER_WORD",
    "DTYPES",
    "StoredPart",
    "code_bytes",
    "packed_bytes",
    "stage_bits",
    "stored_grid",
    "stored_table",
]

# What safetensors calls the dtypes of stored parts.
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.int8: "I8",
}

CODES_PER_WORD = 64  # of an ANS stream, at most: 32 times what a byte a code takes
COUNTS = (torch.uint8, torch.uint16, torch.uint32)


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """What the header must say of a part: one of `dtypes`, and `shape` (None: any length)."""

    shape: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...]

    def fits(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether a tensor of this shape and dtype is such a part."""
        return (
            dtype in self.dtypes
            and len(shape) == len(self.shape)
            and all(want in (None, side) for want, side in zip(self.shape, shape, strict=True))
        )

    def __str__(self) -> str:
        sides = ", ".join("any" if side is None else str(side) for side in self.shape)
        return f"{' or '.join(DTYPES[dtype] for dtype in self.dtypes)} [{sides}]"


def stored_grid(outline: Outline) -> tuple[int, int]:
    """Rows and columns of the codes in the order of storage."""
    rows, columns = code_grid(outline.spec, outline.n, outline.k)
    return (columns, rows) if outline.spec.traversal == "column" else (rows, columns)


def stored_table(info: TensorInfo) -> dict[str, StoredPart]:
    """The parts of a matrix as they lie in a file, in order."""
    table: dict[str, StoredPart] = {}
    packed = [stage for stage, coding in enumerate(info.coding) if coding == "packed"]
    coded = [stage for stage, coding in enumerate(info.coding) if coding == "ans"]
    if packed:
        rows, columns = stored_grid(info)
        words = packed_words(columns, stage_bits(info.spec, packed))
        table["codes"] = StoredPart((rows, words), (torch.int32,))
    for stage in coded:
        table[f"ans_{stage}"] = StoredPart((None,), (torch.uint32,))
    for stage, entries in enumerate(info.spec.stages):
        if info.usage or stage in coded:
            table[f"usage_{stage}"] = StoredPart((entries,), COUNTS)
    for name, part in info.table().items():
        if name != "codes":
            table[name] = StoredPart(part.shape, (part.dtype,))
    return table


def stage_bits(spec: CodebookSpec, stages: Sequence[int]) -> list[int]:
    """Code widths of some of the stages."""
    return [spec.code_bits[stage] for stage in stages]


def packed_bytes(outline: Outline, stages: Sequence[int]) -> int:
    """Bytes of a bitstream of some of the stages."""
    rows, columns = stored_grid(outline)
    return rows * packed_words(columns, stage_bits(outline.spec, stages)) * 4 if stages else 0


def code_bytes(info: TensorInfo) -> int:
    """Bytes of the codes in the file, with the usage that decoding them needs."""
    needed = {"codes"}
    for stage, coding in enumerate(info.coding):
        if coding == "ans":
            needed |= {f"ans_{stage}", f"usage_{stage}"}
    return sum(size for part, size in info.part_bytes.items() if part in needed)
