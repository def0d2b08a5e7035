"""Device functions shared by the Triton kernels: from codes to a tile of entries.

A tile is `[TILE_ROWS, TILE_CELLS, LENGTH]`: rows of codes, cells along the columns of codes, and
the elements of a vector. Lanes outside the grid of codes read code 0 and meet an x of 0.

Codes in any of `LAYOUTS` of vqkernels/kernels/layout.py.
"""

# mypy: ignore-errors
# device functions are typed by Triton, not by annotations

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def sum_first(values, count):
    """Sum of the first `count` values of a constexpr tuple."""
    return sum(values[:count])


@triton.jit
def load_code(
    codes, row, cell, inside, STAGE: tl.constexpr, ROWS, COLUMNS, WORDS,
    LAYOUT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The code of `STAGE` at each `(row, cell)`, int32; 0 where not `inside`."""
    STAGES: tl.constexpr = len(BITS)
    if LAYOUT == "packed":
        TOTAL: tl.constexpr = sum_first(BITS, STAGES)
        bit = cell * TOTAL + sum_first(BITS, STAGE)
        word = bit // 32
        low = tl.load(codes + row * WORDS + word, mask=inside, other=0)
        # a code may straddle two words; the last word of a row has no next
        more = inside & (word + 1 < WORDS)
        high = tl.load(codes + row * WORDS + word + 1, mask=more, other=0)
        both = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(
            tl.uint32, bitcast=True
        ).to(tl.uint64)
        return ((both >> (bit % 32).to(tl.uint64)) & ((1 << BITS[STAGE]) - 1)).to(tl.int32)
    if LAYOUT == "cells":
        at = (row * COLUMNS + cell) * STAGES + STAGE
    elif LAYOUT == "planes":
        at = (STAGE * ROWS + row) * COLUMNS + cell
    else:
        at = (STAGE * COLUMNS + cell) * ROWS + row
    return tl.load(codes + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def first_entry(
    row, cell, inside, row_sets, column_sets,
    ENTRIES: tl.constexpr, ROW_SETS: tl.constexpr, COLUMN_SETS: tl.constexpr,
):  # fmt: skip
    """Row of `books` where the codebook set of each `(row, cell)` begins."""
    book = row * 0 + cell * 0
    if ROW_SETS:
        book += tl.load(row_sets + row + cell * 0, mask=inside, other=0).to(tl.int32)
    if COLUMN_SETS:
        book += tl.load(column_sets + cell + row * 0, mask=inside, other=0).to(tl.int32)
    return book * sum_first(ENTRIES, len(ENTRIES))


@triton.jit
def load_entries(
    codes, books, base, row, cell, inside, STAGE: tl.constexpr, ROWS, COLUMNS, WORDS,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Entries of one stage, `[TILE_ROWS, TILE_CELLS, LENGTH]`, in the dtype of `books`."""
    code = load_code(codes, row, cell, inside, STAGE, ROWS, COLUMNS, WORDS, LAYOUT, BITS)
    at = (base + code + sum_first(ENTRIES, STAGE)) * LENGTH
    element = tl.arange(0, LENGTH)[None, None, :]
    return tl.load(books + at[:, :, None] + element)


@triton.jit
def sum_entries(
    codes, books, row_sets, column_sets, row, cell, ROWS, COLUMNS, WORDS,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
    ROW_SETS: tl.constexpr, COLUMN_SETS: tl.constexpr,
):  # fmt: skip
    """The decoded tile, fp32: all stages summed in registers."""
    inside = (row < ROWS) & (cell < COLUMNS)
    base = first_entry(row, cell, inside, row_sets, column_sets, ENTRIES, ROW_SETS, COLUMN_SETS)
    total = load_entries(
        codes, books, base, row, cell, inside, 0, ROWS, COLUMNS, WORDS,
        LAYOUT, BITS, ENTRIES, LENGTH,
    ).to(tl.float32)  # fmt: skip
    for stage in tl.static_range(1, len(ENTRIES)):
        total += load_entries(
            codes, books, base, row, cell, inside, stage, ROWS, COLUMNS, WORDS,
            LAYOUT, BITS, ENTRIES, LENGTH,
        ).to(tl.float32)  # fmt: skip
    return total


@triton.jit
def load_x(x, token, cell, M, COLUMNS, K, LENGTH: tl.constexpr, ALONG_IN: tl.constexpr):
    """What a tile of cells multiplies, fp32: `[TOKENS, TILE_CELLS, LENGTH]`.

    Along out a cell has one x: the last axis is 1.
    """
    inside = (token < M)[:, None, None] & (cell < COLUMNS)[None, :, None]
    start = token.to(tl.int64)[:, None, None] * K
    if ALONG_IN:
        at = start + cell[None, :, None] * LENGTH + tl.arange(0, LENGTH)[None, None, :]
    else:
        at = start + cell[None, :, None]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
