"""vectorized: 16 bytes of codes a load, entries loaded whole, an FMA a stage.

Codes in words `[stages, rows, words]` int32, little end first, a row padded to 16 bytes. A thread
loads `load_bytes` of one row, takes its codes out of the words by shifts, and walks them: an entry
of 8 fp16 is one 16-byte load, and its products are summed at once, in the thread. So codes never
leave the thread that loaded them, and it holds a sum a token (`vector_length` sums for vectors
along out), not one an element. Spans as in `gemv`.
"""

# mypy: ignore-errors
# device functions are typed by Triton, not by annotations

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.kernels import gathers, layout
from vqkernels.kernels.triton import counts, gemv, traits
from vqkernels.kernels.triton.decode import first_entry, load_x, sum_first
from vqkernels.kernels.triton.program import Program
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.work import Work

SPACE = Space(
    params=(
        Param("layout", ("words",), "rows of codes padded to 16 bytes"),
        Param("load_bytes", (4, 8, 16), "codes a load"),
        Param("tokens", (1, 2, 4), "tokens that share a decode"),
        Param("splits", (1, 2, 4, 8, 16), "spans of k summed apart"),
        Param("tile_rows", (2, 4, 8, 16, 32), "rows of codes a program"),
        Param("tile_cells", (16, 32, 64, 128, 256, 512), "cells a step"),
        Param("warps", (2, 4, 8), "warps a program"),
    ),
    constraints=(
        Constraint(
            "a load of byte codes for every thread",
            lambda c: (
                c.number("tile_rows") * c.number("tile_cells")
                >= c.number("load_bytes") * 32 * c.number("warps")
            ),
        ),
        Constraint(
            "at most 4 loads of byte codes a thread and token",
            lambda c: (
                c.number("tokens") * c.number("tile_rows") * c.number("tile_cells")
                <= 4 * c.number("load_bytes") * 32 * c.number("warps")
            ),
        ),
    ),
)


@triton.jit
def load_words(
    codes, row, piece, inside, STAGE: tl.constexpr, ROWS, PIECES, LOAD: tl.constexpr,
):  # fmt: skip
    """`LOAD` words of each `(row, piece)` as a tuple of four; the rest repeat the last."""
    at = ((STAGE * ROWS + row) * PIECES + piece) * LOAD
    # the mask is the same for all words of a load: else it is split into single words
    words = tl.load(
        codes + at[:, :, None] + tl.arange(0, LOAD)[None, None, :], mask=inside[:, :, None], other=0
    )
    if LOAD == 1:
        word = tl.reshape(words, (words.shape[0], words.shape[1]))
        found = (word, word, word, word)
    elif LOAD == 2:
        low, high = tl.split(words)
        found = (low, high, high, high)
    else:
        # [.., 4] as [.., 2, 2]: split takes the last axis apart, so even words come first
        even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 2, 2)))
        zero, two = tl.split(even)
        one, three = tl.split(odd)
        found = (zero, one, two, three)
    return found


@triton.jit
def load_stages(
    codes, row, piece, inside, STAGES: tl.constexpr, ROWS, PIECES, LOAD: tl.constexpr,
):  # fmt: skip
    """`load_words` of every stage, as a tuple of four; the rest repeat the first."""
    zero = load_words(codes, row, piece, inside, 0, ROWS, PIECES, LOAD)
    one, two, three = zero, zero, zero
    if STAGES > 1:
        one = load_words(codes, row, piece, inside, 1, ROWS, PIECES, LOAD)
    if STAGES > 2:
        two = load_words(codes, row, piece, inside, 2, ROWS, PIECES, LOAD)
    if STAGES > 3:
        three = load_words(codes, row, piece, inside, 3, ROWS, PIECES, LOAD)
    return zero, one, two, three


@triton.jit
def product(
    weight, x, token, cells, M, last, K, LENGTH: tl.constexpr, ALONG_IN: tl.constexpr,
):  # fmt: skip
    """Entries `[rows, loads, length]` times the x of one token: summed along in, each along out."""
    values = load_x(x, token + tl.arange(0, 1), cells, M, last, K, LENGTH, ALONG_IN)
    # an axis more and off again leaves Triton its choice of layout: as loaded, 16 elements of pq-m8
    # go through 4 KB of shared memory, not 512 bytes
    values = tl.reshape(values[:, None], (1, values.shape[1], values.shape[2]))
    if ALONG_IN:
        share = tl.sum(weight * values, 2, keep_dims=True)
    else:
        share = weight * values
    return share


@triton.jit
def products(
    weight, x, token, cells, M, last, K, LENGTH: tl.constexpr, ALONG_IN: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """`product` of each token, `[rows, loads, elements, TOKENS]`.

    Joined, not broadcast: so a thread keeps its entries for all tokens.
    """
    zero = product(weight, x, token, cells, M, last, K, LENGTH, ALONG_IN)
    if TOKENS == 1:
        all = tl.reshape(zero, (zero.shape[0], zero.shape[1], zero.shape[2], 1))
    else:
        one = product(weight, x, token + 1, cells, M, last, K, LENGTH, ALONG_IN)
        if TOKENS == 2:
            all = tl.join(zero, one)
        else:
            two = product(weight, x, token + 2, cells, M, last, K, LENGTH, ALONG_IN)
            three = product(weight, x, token + 3, cells, M, last, K, LENGTH, ALONG_IN)
            pairs = tl.join(tl.join(zero, two), tl.join(one, three))
            all = tl.reshape(pairs, (zero.shape[0], zero.shape[1], zero.shape[2], 4))
    return all


@triton.jit
def vectorized(
    x, codes, books, row_sets, column_sets, out,
    M, K, WIDTH, ROWS, COLUMNS, PIECES, SPAN,
    CODE_BITS: tl.constexpr, LOAD: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
    ROW_SETS: tl.constexpr, COLUMN_SETS: tl.constexpr, ALONG_IN: tl.constexpr,
    TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CELLS: tl.constexpr,
):  # fmt: skip
    """`out: [spans, M, WIDTH]`, as `gemv.gemv`; PIECES loads of LOAD words a row of codes."""
    A_WORD: tl.constexpr = 32 // CODE_BITS
    A_LOAD: tl.constexpr = LOAD * A_WORD
    ELEMENTS: tl.constexpr = 1 if ALONG_IN else LENGTH
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1) * TOKENS
    row = rows[:, None]
    element = tl.arange(0, LENGTH)[None, None, :]
    first = tl.program_id(2) * SPAN
    last = tl.minimum(first + SPAN, COLUMNS)
    sums = tl.zeros((TILE_ROWS, TILE_CELLS // A_LOAD, ELEMENTS, TOKENS), tl.float32)
    for start in range(first, last, TILE_CELLS):
        piece = (start // A_LOAD + tl.arange(0, TILE_CELLS // A_LOAD))[None, :]
        inside = (row < ROWS) & (piece < PIECES)
        words = load_stages(codes, row, piece, inside, len(ENTRIES), ROWS, PIECES, LOAD)
        # stages within codes: what x holds for one code is used up before the next is loaded
        for code in tl.static_range(A_LOAD):
            cell = piece * A_LOAD + code
            known = inside & (cell < COLUMNS)
            base = first_entry(
                row, cell, known, row_sets, column_sets, ENTRIES, ROW_SETS, COLUMN_SETS
            )
            cells = start + tl.arange(0, TILE_CELLS // A_LOAD) * A_LOAD + code
            for stage in tl.static_range(len(ENTRIES)):
                word = words[stage][code // A_WORD] >> (CODE_BITS * (code % A_WORD))
                entry = base + sum_first(ENTRIES, stage) + (word & ((1 << CODE_BITS) - 1))
                weight = tl.load(books + entry[:, :, None] * LENGTH + element).to(tl.float32)
                sums += products(weight, x, token, cells, M, last, K, LENGTH, ALONG_IN, TOKENS)
    tokens = token + tl.arange(0, TOKENS)[None, None, :]
    part = rows[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    at = (tl.program_id(2) * M + tokens).to(tl.int64) * WIDTH + part[:, :, None]
    inside_out = (tokens < M) & (row < ROWS)[:, :, None]
    tl.store(out + at, tl.sum(sums, 1), mask=inside_out)


def supports(problem: Problem, device: Device) -> str | None:
    """Up to four stages of vectors that are a power of two long."""
    return traits.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """A 16-byte load a thread and step; spans until every multiprocessor has two programs."""
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    # x of a cell is in registers, fp32, for all tokens at once
    tokens = min(4, 1 << (problem.m - 1).bit_length(), 32 // problem.spec.vector_length)
    programs = -(-rows // 16) * -(-problem.m // tokens)
    wanted = max(1, 2 * device.units // programs)
    return Config(
        layout="words",
        load_bytes=16,
        tokens=tokens,
        splits=max(s for s in (1, 2, 4, 8, 16) if s == 1 or (s <= wanted and s * 128 <= columns)),
        tile_rows=16,
        tile_cells=128,
        warps=4,
    )


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product, stage by stage."""
    plain = gemv.program(config, problem, fused=False)
    numbers, constants = dict(plain.numbers), dict(plain.constants)
    load = config.number("load_bytes") // 4
    del numbers["WORDS"], constants["LAYOUT"], constants["BITS"], constants["FUSED"]
    return (
        plain.replace(
            function=vectorized,
            numbers={**numbers, "PIECES": layout.row_words(problem) // load},
            constants={**constants, "CODE_BITS": layout.code_bits(problem), "LOAD": load},
        ),
    )


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """A lane's cells one by one, all tokens of its own; see `counts` for what the loop costs."""
    (product,) = programs(config, problem)
    spec = problem.spec
    gather, tile = counts.global_gather(problem, product, device), gemv.tile(product)
    length, stages = spec.vector_length, len(spec.stages)
    inputs = length if spec.vector_axis == "in" else 1
    itemsize = problem.torch_dtype.itemsize
    x_pieces = inputs * itemsize / gathers.wide(inputs, itemsize)
    # products of an entry, and the sum of a cell's
    a_gather = gather.instructions + tile.tokens * (length + (spec.vector_axis == "in"))
    # x of a cell: its accesses, its conversion, the mask and the zeros of lanes past the end
    a_cell = tile.tokens * (x_pieces + gathers.convert(itemsize, inputs) + 3)
    step = counts.Step(
        8 + tile.lanes * (stages * a_gather + a_cell),
        # a warp's x: each lane its own 16 bytes, apart by what a load of codes stands for
        tile.lanes * (stages * gather.wavefronts + tile.tokens * x_pieces * 8),
        # an entry, and of each token x and sums
        40 + length * (1 + tile.tokens),
        shared_trips=tile.lanes,
    )
    return counts.products(product, problem, device, tile, step, gather)


KERNEL = Kernel(
    name="vectorized",
    op="linear",
    backend="triton",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=gemv.footprinter(programs),
    pack=gemv.pack,
    compile=gemv.compiler(programs),
    programs=programs,
    work=work,
    about="16 bytes of codes a load, whole-entry loads, an FMA a stage",
)
