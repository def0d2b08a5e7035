"""The loop of `vectorized` and `fused_rq`: gather whole entries, four accumulators of rows.

A thread takes ROWS rows of codes at once: one load of x serves them all, and their independent
chains hide the 4-cycle latency of a fused multiply-add. An accumulator is one vector of TOKENS *
vector_length lanes; the entry is repeated for each token (along `in`) or x is spread over the
entry's lanes (along `out`, where the accumulator is y itself).

`fused` decides whether the stages of a cell are summed before the multiplication (one FMA a cell)
or multiplied one by one (an FMA a stage, no dependent adds).
"""

# mypy: ignore-errors
# device functions are typed by numba's inference, not by annotations

from __future__ import annotations

import functools

import numpy as np
from numba import njit, prange
from numba.extending import register_jitable
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Packed, Run
from vqkernels.kernels import linear
from vqkernels.kernels.linear import core_shape, surround
from vqkernels.kernels.numba import cells, simd, threads  # noqa: F401  (threads settles the pool)
from vqkernels.kernels.numba.cells import BLOCK, Shape
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.tensor import QuantizedTensor

ROWS = 4

SPACE = Space(
    params=(
        Param("tokens", (1, 2, 4, 8), "tokens that share one decode of the weight"),
        Param("row_tile", (16, 32, 64, 128, 256), "rows of codes a thread takes at a time"),
    ),
    constraints=(
        Constraint("tile of whole row blocks", lambda c: c.number("row_tile") % ROWS == 0),
    ),
)


def supports(problem: Problem, device: Device) -> str | None:
    """Vectors that fit the accumulators."""
    if problem.spec.vector_length > 64:
        return f"vectors of {problem.spec.vector_length} exceed the 64 lanes of an accumulator"
    return cells.unsupported_activations(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """As many tokens as there are, while four accumulators stay within 16 512-bit registers."""
    lanes = 64 // max(4, problem.spec.vector_length)
    tokens = max(1, min(8, lanes, 1 << (problem.m - 1).bit_length()))
    rows, _ = code_grid(problem.spec, problem.n, problem.k)
    tile = next((t for t in (128, 64, 32) if rows >= 8 * t * device.units), 16)
    return Config(tokens=tokens, row_tile=tile)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Words, fp32 codebooks, and x interleaved once more."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    weight = cells.words_bytes(spec, rows, columns, ROWS) + linear.books_bytes(problem)
    weight += linear.sides_bytes(problem) + 8 * (rows + columns + ROWS + BLOCK)
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    tokens = problem.m + config.number("tokens")
    workspace = 4 * tokens * (width_x + BLOCK * spec.vector_length + width_y + 2 * problem.k)
    return Footprint(weight_bytes=weight, workspace_bytes=workspace, flops=problem.flops)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Words of four rows side by side."""
    return Packed(cells.core_arrays(tensor, ROWS))


@functools.cache
def kernel(shape: Shape, tokens: int, fused: bool):
    """The compiled loop for one shape and width of tokens."""
    accumulate = _accumulator(shape, tokens, fused)
    finish = _finisher(shape, tokens)
    lanes, words = tokens * shape.length, shape.block_words
    x_step = lanes if shape.along_in else tokens
    set_size = shape.entries * shape.length
    column_sets, row_sets = shape.column_sets, shape.row_sets

    @register_jitable
    def row_block(block, packed, books, rows_of, columns_of, x, out, width, count):
        a, b, c, d = simd.zero(lanes), simd.zero(lanes), simd.zero(lanes), simd.zero(lanes)
        columns = packed.shape[1] * BLOCK
        flat = packed.reshape(packed.size)
        index = block * packed.shape[1] * words * ROWS
        row = block * ROWS
        base_a = base_b = base_c = base_d = 0
        if row_sets:
            base_a, base_b = rows_of[row] * set_size, rows_of[row + 1] * set_size
            base_c, base_d = rows_of[row + 2] * set_size, rows_of[row + 3] * set_size
        for first in range(0, columns, BLOCK):
            simd.prefetch(flat, index + cells.AHEAD)
            for cell in range(BLOCK):
                base = columns_of[first + cell] * set_size if column_sets else 0
                at = (first + cell) * x_step
                a = accumulate(a, books, flat, index, base + base_a, cell, x, at)
                b = accumulate(b, books, flat, index + 1, base + base_b, cell, x, at)
                c = accumulate(c, books, flat, index + 2, base + base_c, cell, x, at)
                d = accumulate(d, books, flat, index + 3, base + base_d, cell, x, at)
            index += words * ROWS
        finish(a, out, width, row, count)
        finish(b, out, width, row + 1, count)
        finish(c, out, width, row + 2, count)
        finish(d, out, width, row + 3, count)

    @njit(parallel=True)
    def run(packed, books, rows_of, columns_of, x, out, width, count, row_tile):
        blocks = packed.shape[0]
        tile = row_tile // ROWS
        for item in prange((blocks + tile - 1) // tile):
            for block in range(item * tile, min(blocks, item * tile + tile)):
                row_block(block, packed, books, rows_of, columns_of, x, out, width, count)

    return run


def _accumulator(shape: Shape, tokens: int, fused: bool):
    """`accumulate(total, books, words, index, base, cell, x, at)`: total plus one cell."""
    decoders = cells.decoder(shape)
    operand = _operand(shape, tokens)
    widen = _widener(shape, tokens)

    def chain(stage):
        entry = decoders[stage]
        if stage == len(decoders) - 1:

            @register_jitable
            def last(vector, books, words, index, base, cell):
                return simd.add(vector, entry(books, words, index, base, cell, ROWS))

            return last
        after = chain(stage + 1)

        @register_jitable
        def inner(vector, books, words, index, base, cell):
            return after(
                simd.add(vector, entry(books, words, index, base, cell, ROWS)),
                books,
                words,
                index,
                base,
                cell,
            )

        return inner

    return _fused(decoders, chain, operand, widen) if fused else _separate(decoders, operand, widen)


def _fused(decoders, chain, operand, widen):
    first = decoders[0]
    rest = chain(1)

    @register_jitable
    def accumulate(total, books, words, index, base, cell, x, at):
        vector = rest(first(books, words, index, base, cell, ROWS), books, words, index, base, cell)
        return simd.fma(widen(vector), operand(x, at), total)

    return accumulate


def _separate(decoders, operand, widen):
    def chain(stage):
        entry = decoders[stage]

        @register_jitable
        def one(total, books, words, index, base, cell, x):
            return simd.fma(widen(entry(books, words, index, base, cell, ROWS)), x, total)

        if stage == len(decoders) - 1:
            return one
        after = chain(stage + 1)

        @register_jitable
        def more(total, books, words, index, base, cell, x):
            total = one(total, books, words, index, base, cell, x)
            return after(total, books, words, index, base, cell, x)

        return more

    every = chain(0)

    @register_jitable
    def accumulate(total, books, words, index, base, cell, x, at):
        return every(total, books, words, index, base, cell, operand(x, at))

    return accumulate


def _operand(shape: Shape, tokens: int):
    length, lanes = shape.length, tokens * shape.length
    if shape.along_in:

        @register_jitable
        def operand(x, at):
            return simd.load(x, at, lanes)

    else:

        @register_jitable
        def operand(x, at):
            return simd.spread(simd.load(x, at, tokens), length)

    return operand


def _widener(shape: Shape, tokens: int):
    @register_jitable
    def widen(vector):
        return simd.repeat(vector, tokens)

    return widen


def _finisher(shape: Shape, tokens: int):
    """`finish(total, out, width, row, count)`: write one row of codes for `count` tokens."""
    length = shape.length
    along_in = shape.along_in

    @register_jitable
    def finish(total, out, width, row, count):
        step = 1 if along_in else length
        if row * step >= width:
            return  # padding of the last row block
        for token in range(count):
            vector = simd.part(total, token, length)
            if along_in:
                out[token * width + row] = simd.sum_lanes(vector)
            else:
                simd.store(out, token * width + row * length, vector)

    return finish


def compiler(fused: bool):
    """The `compile` of a kernel file."""

    def compile(config: Config, problem: Problem, device: Device) -> Run:
        shape = Shape.of(problem.spec)
        tile = config.number("row_tile")
        plan = list(cells.passes(problem.m, config.number("tokens")))
        loops = {width: kernel(shape, width, fused) for _, width in plan}

        def core(packed: Packed, x: Tensor, out: Tensor) -> None:
            words = packed["words"].numpy().view(np.uint64).reshape(packed["words"].shape[0], -1, 1)
            words = words.reshape(words.shape[0], -1, shape.block_words * ROWS)
            books = packed["books"].numpy().reshape(-1)
            rows_of, columns_of = cells.set_arrays(packed)
            columns = out.shape[1]
            for first, width in plan:
                tokens = x[first : first + width]
                tiles = cells.interleave(tokens, shape, width)
                y = out[first : first + len(tokens)].numpy().reshape(-1)
                loops[width](
                    words, books, rows_of, columns_of, tiles, y, columns, len(tokens), tile
                )

        return surround(core, problem)

    return compile
