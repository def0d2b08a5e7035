"""Shared by the numba kernels: codes in words, decoding one cell, tiling tokens.

**Codes.** Cells go in blocks of 8 along a row of codes. A stage of up to 256 entries is one
64-bit word a block, a larger one two words of four 16-bit codes, so mixed stages cost what they
need. The words of ROWS consecutive rows lie side by side:

    words: [rows / ROWS, columns / 8, words a block, ROWS] uint64

padded with code 0; the padding of x is zero, so padded cells add nothing.

**x.** Tokens are taken `TOKENS` at a time and interleaved so that one vector holds what a cell
multiplies: along `in` `[columns, TOKENS, vector_length]`, along `out` `[columns, TOKENS]`.

**No disk cache.** The loops are closures over a Shape, compiled once a process (1 to 2 s). numba
names a closure's symbols by its qualified name and a counter of the process, so that two processes
cache different shapes under one name; a third that loads both links the wrong one and corrupts its
heap (numba 0.68). Only functions at module level are safe with `cache=True`.
"""

# mypy: ignore-errors
# device functions are typed by numba's inference, not by annotations

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernels.linear import pack_books, pack_sets, pack_sides, set_axes
from vqkernels.kernels.numba import simd
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "AHEAD",
    "BLOCK",
    "LINE",
    "Shape",
    "core_arrays",
    "decoder",
    "interleave",
    "pack_words",
    "passes",
]

BLOCK = 8  # cells a block: the 8-bit codes of one 64-bit word
LINE = 8  # 64-bit words of a 64-byte cache line

# Words to ask for ahead of their use, 2 KiB. Hardware prefetchers stop at each 4 KiB page: on
# Zen 4 a table sweep over cold codes took 1.22 ms without this and 0.93 ms with it.
AHEAD = 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """The constants that a kernel is compiled for."""

    along_in: bool
    length: int
    stages: tuple[int, ...]
    column_sets: bool
    row_sets: bool

    @classmethod
    def of(cls, spec: CodebookSpec) -> Shape:
        """The constants of `spec`."""
        row_sets, column_sets = set_axes(spec)
        return cls(
            along_in=spec.vector_axis == "in",
            length=spec.vector_length,
            stages=spec.stages,
            column_sets=column_sets,
            row_sets=row_sets,
        )

    @property
    def code_bits(self) -> tuple[int, ...]:
        """Bits of a stage's code in a word: 8 or 16."""
        return tuple(8 if entries <= 256 else 16 for entries in self.stages)

    @property
    def block_words(self) -> int:
        """64-bit words of a block."""
        return sum(self.code_bits) // 8

    @property
    def entries(self) -> int:
        """Entries of all stages together: the codebook rows of one set."""
        return sum(self.stages)


def unsupported_activations(problem: Problem, device: Device) -> str | None:
    """The sentence that rules out what no numba kernel takes, or None."""
    if device.kind != "cpu":
        return f"numba kernels run on the CPU, not on {device.name}"
    if problem.dtype != "float32":
        return f"CPU kernels take float32 activations, not {problem.dtype}"
    return None


def words_bytes(spec: CodebookSpec, rows: int, columns: int, row_block: int) -> int:
    """Bytes of the packed words of a `[rows, columns]` grid of codes."""
    padded = -(-rows // row_block) * row_block * -(-columns // BLOCK)
    return padded * Shape.of(spec).block_words * 8


def pack_words(codes: Tensor, shape: Shape, row_block: int) -> Tensor:
    """`codes: [rows, columns, stages]` as `[rows/row_block, columns/8, words, row_block]` int64."""
    rows, columns, _ = codes.shape
    padded = (-rows % row_block, -columns % BLOCK)
    planes = []
    for stage, bits in enumerate(shape.code_bits):
        plane = codes[..., stage].numpy().astype(np.uint8 if bits == 8 else np.uint16)
        plane = np.pad(plane, ((0, padded[0]), (0, padded[1])))
        planes.append(plane.view(np.uint64).reshape(plane.shape[0], -1, bits // 8))
    words = np.concatenate(planes, axis=2)
    words = words.reshape(-1, row_block, *words.shape[1:]).transpose(0, 2, 3, 1)
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))


def core_arrays(tensor: QuantizedTensor, row_block: int) -> dict[str, Tensor]:
    """Words, codebooks, set numbers and sides of a tensor, as the word kernels take them."""
    shape = Shape.of(tensor.spec)
    arrays = {"words": pack_words(tensor.parts["codes"], shape, row_block)}
    arrays["books"] = pack_books(tensor)
    if "row_sets" in (sets := pack_sets(tensor)):
        arrays["row_sets"] = _pad_to(sets["row_sets"], row_block)
    return arrays | pack_column_sets(tensor) | pack_sides(tensor)


def pack_column_sets(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """`column_sets`, padded to whole blocks, where the format has them."""
    sets = pack_sets(tensor)
    return {"column_sets": _pad_to(sets["column_sets"], BLOCK)} if "column_sets" in sets else {}


def _pad_to(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % multiple))


_NO_SETS = np.zeros(1, np.int64)


def set_arrays(packed) -> tuple[np.ndarray, np.ndarray]:
    """`row_sets` and `column_sets`, or one zero for each that the format lacks."""
    return tuple(
        packed[name].numpy() if name in packed else _NO_SETS for name in ("row_sets", "column_sets")
    )


def passes(m: int, tokens: int) -> Iterator[tuple[int, int]]:
    """`(first token, width)` of each pass over the codes; the last is the next power of two."""
    for first in range(0, m, tokens):
        left = m - first
        yield first, tokens if left >= tokens else 1 << (left - 1).bit_length()


def interleave(x: Tensor, shape: Shape, width: int, *, elements: bool = False) -> np.ndarray:
    """Tokens `x: [<= width, core columns]` as the kernels read them, flat, zero-padded.

    With `elements`, tokens are innermost: `[columns, vector_length, width]`, as tables want it.
    """
    tokens = x.shape[0]
    length = shape.length if shape.along_in else 1
    columns = x.shape[1] // length
    padded = -(-columns // BLOCK) * BLOCK
    if width == 1 and padded == columns:
        return x.numpy().reshape(-1)
    tiles = torch.zeros((padded, length, width) if elements else (padded, width, length))
    cells = x.reshape(tokens, columns, length)
    if elements:
        tiles[:columns, :, :tokens] = cells.permute(1, 2, 0)
    else:
        tiles[:columns, :tokens] = cells.transpose(0, 1)
    return tiles.numpy().reshape(-1)


@functools.cache
def decoder(shape: Shape) -> tuple[Callable, ...]:
    """Functions `entry(books, words, index, base, cell, rows)` a stage: one looked-up vector.

    `index` is the block's first word of this row, `rows` the distance between its words, `base`
    the flat offset of the codebook set, `cell` the cell's number within the block.
    """
    functions, first_word, first_entry = [], 0, 0
    for entries, bits in zip(shape.stages, shape.code_bits, strict=True):
        functions.append(_stage_decoder(shape.length, first_word, first_entry, bits))
        first_word += bits // 8
        first_entry += entries
    return tuple(functions)


def _stage_decoder(length: int, first_word: int, first_entry: int, bits: int) -> Callable:
    per_word = 64 // bits
    offset, mask = first_entry * length, np.uint64((1 << bits) - 1)

    @register_jitable
    def entry(books, words, index, base, cell, rows):
        word = words[index + (first_word + cell // per_word) * rows]
        code = np.intp((word >> np.uint64(cell % per_word * bits)) & mask)
        return simd.load(books, base + offset + code * length, length)

    return entry
