"""table: dot products of x with every entry, once; then a lookup and an add a code.

For a word of 8 codes (8 consecutive cells of one stage, `cells`) the kernel builds 8 tables
`[entries, TOKENS]` of x . entry, 8 KB at 256 entries and one token, so that they stay in L1, and
sweeps the rows of its tile past them: a code costs one load and one add, whatever the vector's
length, where a gather multiplies vector_length times. The build is spread over the rows.

Codes word-column-major: `[row tiles of all rows][block][stage][row]`, one contiguous stream of
64-bit words a sweep. Lookups are scalar loads on purpose: on Zen 4 an AVX-512 gather of 16 costs
more than 16 loads.

Work is split over row tiles and, `splits`, over blocks of columns; partial sums of the splits are
added in a fixed order, so that the result doesn't depend on the number of threads.
"""

# mypy: ignore-errors
# device functions are typed by numba's inference, not by annotations

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit, prange
from numba.extending import register_jitable
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels import linear
from vqkernels.kernels.linear import core_shape, pack_books, pack_sides, surround
from vqkernels.kernels.numba import cells, simd, threads  # noqa: F401  (threads settles the pool)
from vqkernels.kernels.numba.cells import BLOCK, Shape
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.tensor import QuantizedTensor

LANES = 16  # entries built at a time for one token: an AVX-512 register of fp32

SPACE = Space(
    params=(
        Param("tokens", (1, 2, 4, 8), "tokens in a table word"),
        Param("row_tile", (512, 1024, 2048, 4096, 8192), "rows that share one build"),
        Param("splits", (1, 2, 4, 8), "parts of k summed apart"),
    )
)


def supports(problem: Problem, device: Device) -> str | None:
    """Vectors along in, byte codes, and codebooks that all rows share."""
    spec = problem.spec
    if spec.vector_axis == "out":
        return "vectors along out: each product belongs to one row, so no dot product is shared"
    if spec.max_entries > 256:
        return (
            f"{spec.max_entries:,} entries: a table of that size costs more than the products "
            f"it saves; up to 256 are supported"
        )
    if spec.group_axis == "row":
        return f"a codebook for every {spec.group_size} rows: each would need tables of its own"
    return cells.unsupported_activations(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """As many tokens as there are; a tile and split that give each thread one long sweep."""
    tokens = min(8, 1 << (problem.m - 1).bit_length())
    tile = next((t for t in (512, 1024, 2048) if t >= problem.n), 4096)
    tiles = -(-problem.n // tile)
    splits = next((s for s in (1, 2, 4) if tiles * s % device.units == 0), 8)
    return Config(tokens=tokens, row_tile=tile, splits=splits)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Words and codebooks; per token the builds of every tile and an add a code."""
    spec, m, n = problem.spec, problem.m, problem.n
    rows, columns = code_grid(spec, n, problem.k)
    tile, splits = config.number("row_tile"), config.number("splits")
    weight = cells.words_bytes(spec, rows, columns, 1) + linear.sides_bytes(problem) + 8 * columns
    weight += _padded_entries(spec.stages) * linear.books_bytes(problem) // sum(spec.stages)
    tiles, entries = -(-n // tile), _padded_entries(spec.stages)
    builds = 2 * m * tiles * columns * entries * spec.vector_length
    adds = m * rows * columns * len(spec.stages)
    width_x, width_y = core_shape(spec, n, problem.k)
    tokens = m + config.number("tokens")
    local = (tile + BLOCK * _padded_entries((spec.max_entries,))) * config.number("tokens")
    workspace = 4 * (tokens * (width_x + 64 * BLOCK + (splits + 1) * width_y + problem.k))
    return Footprint(weight, workspace + 4 * local * device.units, builds + adds)


def _padded_entries(stages: tuple[int, ...]) -> int:
    return sum(-(-entries // LANES) * LANES for entries in stages)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Words `[blocks, stages, rows]`; codebooks `[sets, vector_length, padded entries]`."""
    spec = tensor.spec
    words = cells.pack_words(tensor.parts["codes"], Shape.of(spec), 1)
    arrays = {"words": words[..., 0].permute(1, 2, 0).contiguous()}
    padded = [
        torch.nn.functional.pad(book, (0, 0, 0, -book.shape[1] % LANES))
        for book in pack_books(tensor).split(spec.stages, dim=1)
    ]
    arrays["books"] = torch.cat(padded, dim=1).transpose(1, 2).contiguous()
    return Packed(arrays | cells.pack_column_sets(tensor) | pack_sides(tensor))


@functools.cache
def kernel(shape: Shape, tokens: int):
    """The compiled sweep for one shape and width of tokens."""
    add_blocks = _block_adder(shape, tokens)
    largest = _padded_entries((max(shape.stages),))

    @njit(parallel=True)
    def run(words, books, columns_of, x, partial, row_tile):
        splits, count = partial.shape[0], partial.shape[1]
        blocks, rows = words.shape[0], words.shape[2]
        tiles = (rows + row_tile - 1) // row_tile
        span = (blocks + splits - 1) // splits
        for item in prange(tiles * splits):
            split, first = item // tiles, item % tiles * row_tile
            last = min(rows, first + row_tile)
            sums = np.zeros((last - first) * tokens, np.float32)
            tables = np.empty(BLOCK * largest * tokens, np.float32)
            for block in range(split * span, min(blocks, split * span + span)):
                add_blocks(words[block, :, first:last], books, columns_of, x, block, tables, sums)
            for token in range(count):
                for row in range(first, last):
                    partial[split, token, row] = sums[(row - first) * tokens + token]

    return run


@njit(parallel=True, cache=True)
def _add_splits(partial, out):
    splits, count, rows = partial.shape
    for row in prange(rows):
        for token in range(count):
            value = partial[0, token, row]
            for split in range(1, splits):
                value += partial[split, token, row]
            out[token, row] = value


def _block_adder(shape: Shape, tokens: int):
    """`add(words, books, columns_of, x, block, tables, sums)`: one block of cells, all stages."""
    build, sweep = _builder(shape, tokens), _sweep(tokens)
    length, column_sets, stages = shape.length, shape.column_sets, len(shape.stages)
    padded = [_padded_entries((entries,)) for entries in shape.stages]
    firsts, sizes = np.cumsum([0, *padded[:-1]]).astype(np.int64), np.array(padded, np.int64)
    set_size = length * sum(padded)

    @register_jitable
    def add_blocks(words, books, columns_of, x, block, tables, sums):
        for stage in range(stages):
            entries = sizes[stage]
            for cell in range(BLOCK):
                column = block * BLOCK + cell
                base = firsts[stage]
                if column_sets:
                    base += columns_of[column] * set_size
                to, at = cell * entries * tokens, column * tokens * length
                build(tables, to, books, base, entries, x, at)
            sweep(words[stage], tables, entries, sums)

    return add_blocks


def _builder(shape: Shape, tokens: int):
    """`build(tables, to, books, base, entries, x, at)`: one table of `[entries, tokens]`."""
    length = shape.length
    total = _padded_entries(shape.stages)

    if tokens == 1:

        @register_jitable
        def build(tables, to, books, base, entries, x, at):
            for entry in range(0, entries, LANES):
                sums = simd.zero(LANES)
                for element in range(length):
                    row = simd.load(books, base + element * total + entry, LANES)
                    sums = simd.fma(row, simd.broadcast(x[at + element], LANES), sums)
                simd.store(tables, to + entry, sums)

    else:

        @register_jitable
        def build(tables, to, books, base, entries, x, at):
            for entry in range(entries):
                sums = simd.zero(tokens)
                for element in range(length):
                    value = books[base + element * total + entry]
                    x_tokens = simd.load(x, at + element * tokens, tokens)
                    sums = simd.fma(x_tokens, simd.broadcast(value, tokens), sums)
                simd.store(tables, to + entry * tokens, sums)

    return build


def _sweep(tokens: int):
    """`sweep(words, tables, entries, sums)`: add the 8 looked-up words of each row."""
    byte = np.uint64(255)

    if tokens == 1:

        @register_jitable
        def sweep(words, tables, entries, sums):
            for row in range(words.size):
                if row % cells.LINE == 0:
                    simd.prefetch(words, row + cells.AHEAD)
                word = words[row]
                # four independent pairs: the adds overlap instead of waiting on one sum
                a = tables[np.intp(word & byte)]
                b = tables[entries + np.intp((word >> np.uint64(8)) & byte)]
                c = tables[2 * entries + np.intp((word >> np.uint64(16)) & byte)]
                d = tables[3 * entries + np.intp((word >> np.uint64(24)) & byte)]
                a += tables[4 * entries + np.intp((word >> np.uint64(32)) & byte)]
                b += tables[5 * entries + np.intp((word >> np.uint64(40)) & byte)]
                c += tables[6 * entries + np.intp((word >> np.uint64(48)) & byte)]
                d += tables[7 * entries + np.intp(word >> np.uint64(56))]
                sums[row] += (a + b) + (c + d)

    else:

        @register_jitable
        def sweep(words, tables, entries, sums):
            step = entries * tokens
            for row in range(words.size):
                if row % cells.LINE == 0:
                    simd.prefetch(words, row + cells.AHEAD)
                word = words[row]
                a, b = simd.load(sums, row * tokens, tokens), simd.zero(tokens)
                for pair in range(0, BLOCK, 2):
                    code = np.intp((word >> np.uint64(8 * pair)) & byte)
                    a = simd.add(a, simd.load(tables, pair * step + code * tokens, tokens))
                    code = np.intp((word >> np.uint64(8 * pair + 8)) & byte)
                    b = simd.add(b, simd.load(tables, (pair + 1) * step + code * tokens, tokens))
                simd.store(sums, row * tokens, simd.add(a, b))

    return sweep


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """A build and sweep for each pass over the tokens."""
    shape = Shape.of(problem.spec)
    tile, splits = config.number("row_tile"), config.number("splits")
    plan = list(cells.passes(problem.m, config.number("tokens")))
    loops = {width: kernel(shape, width) for _, width in plan}

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        words = packed["words"].numpy().view(np.uint64)
        books = packed["books"].numpy().reshape(-1)
        columns_of = cells.set_arrays(packed)[1]
        for first, width in plan:
            tokens = x[first : first + width]
            tiles = cells.interleave(tokens, shape, width, elements=True)
            y = out[first : first + len(tokens)].numpy()
            partial = np.empty((splits, *y.shape), np.float32) if splits > 1 else y[None]
            loops[width](words, books, columns_of, tiles, partial, tile)
            if splits > 1:
                _add_splits(partial, y)

    return surround(core, problem)


KERNEL = Kernel(
    name="table",
    op="linear",
    backend="numba",
    runs_on=("cpu",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="dot-product tables: one lookup and add a code",
)
