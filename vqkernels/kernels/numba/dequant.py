"""dequant: decode a tile of rows into a dense buffer, then the BLAS; tile after tile.

A tile's buffer is small enough to stay in cache between its decode and its product, so the dense
weight never travels to memory. Along `in` the buffer is `[tile rows, columns * vector_length]`;
along `out` it is its transpose `[columns, tile rows * vector_length]`, so that entries are stored
whole either way. Codes in words (`cells`), one row at a time. Pays from the m at which the product
outweighs the decode.
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
from vqkernels.kernels.linear import core_shape, surround
from vqkernels.kernels.numba import cells, simd, threads  # noqa: F401  (threads settles the pool)
from vqkernels.kernels.numba.cells import BLOCK, Shape
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.tensor import QuantizedTensor

SPACE = Space(
    params=(Param("tile", (64, 128, 256, 512, 1024, 4096), "output rows decoded at a time"),)
)


def supports(problem: Problem, device: Device) -> str | None:
    """Any spec, fp32."""
    return cells.unsupported_activations(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """The tallest tile that fills half of the last-level cache."""
    room = device.llc_bytes // 2 // (4 * problem.k)
    return Config(tile=next((t for t in (1024, 512, 256, 128) if t <= room), 64))


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Words and codebooks; a dense tile beside them; every product, and an add a later stage."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    weight = cells.words_bytes(spec, rows, columns, 1) + linear.books_bytes(problem)
    weight += linear.sides_bytes(problem) + 8 * (rows + columns + BLOCK)
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    adds = rows * columns * spec.vector_length * (len(spec.stages) - 1)
    tile = 4 * config.number("tile") * (columns + BLOCK) * spec.vector_length
    if spec.vector_axis == "out":
        tile = 4 * (config.number("tile") + spec.vector_length) * (columns + BLOCK)
    workspace = tile + 4 * problem.m * (width_x + 2 * width_y + 2 * problem.k)
    return Footprint(weight, workspace, problem.flops + adds)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Words of single rows."""
    return Packed(cells.core_arrays(tensor, 1))


@functools.cache
def kernel(shape: Shape):
    """The compiled decode of rows `first` to `first + count - 1` of codes into `dense`."""
    decoders = cells.decoder(shape)
    length, words, along_in = shape.length, shape.block_words, shape.along_in
    set_size = shape.entries * shape.length
    column_sets, row_sets = shape.column_sets, shape.row_sets

    def chain(stage):
        entry = decoders[stage]

        @register_jitable
        def one(books, packed, index, base, cell):
            return entry(books, packed, index, base, cell, 1)

        if stage == 0:
            return one
        before = chain(stage - 1)

        @register_jitable
        def more(books, packed, index, base, cell):
            return simd.add(
                before(books, packed, index, base, cell), one(books, packed, index, base, cell)
            )

        return more

    vector = chain(len(decoders) - 1)

    @njit(parallel=True)
    def run(packed, books, rows_of, columns_of, first, count, columns, dense):
        blocks = (columns + BLOCK - 1) // BLOCK
        for row in prange(count):
            index = (first + row) * blocks * words
            base = rows_of[first + row] * set_size if row_sets else 0
            for block in range(blocks):
                for cell in range(min(BLOCK, columns - block * BLOCK)):
                    column = block * BLOCK + cell
                    at = base + (columns_of[column] * set_size if column_sets else 0)
                    value = vector(books, packed, index, at, cell)
                    if along_in:
                        simd.store(dense, (row * columns + column) * length, value)
                    else:
                        simd.store(dense, (column * count + row) * length, value)
                index += words

    return run


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """Decode and multiply, tile by tile."""
    spec = problem.spec
    shape = Shape.of(spec)
    decode = kernel(shape)
    rows, columns = code_grid(spec, problem.n, problem.k)
    features = 1 if shape.along_in else spec.vector_length  # output rows of a row of codes
    tile = max(1, config.number("tile") // features)

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        words = packed["words"].numpy().view(np.uint64).reshape(-1)
        books = packed["books"].numpy().reshape(-1)
        rows_of, columns_of = cells.set_arrays(packed)
        buffer = torch.empty(min(tile, rows) * columns * spec.vector_length)
        for first in range(0, rows, tile):
            count = min(tile, rows - first)
            dense = buffer[: count * columns * spec.vector_length]
            decode(words, books, rows_of, columns_of, first, count, columns, dense.numpy())
            weight = dense.view(count, -1).T if shape.along_in else dense.view(columns, -1)
            span = slice(first * features, (first + count) * features)
            torch.mm(x, weight, out=out[:, span])

    return surround(core, problem)


KERNEL = Kernel(
    name="dequant",
    op="linear",
    backend="numba",
    runs_on=("cpu",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="decode a tile to dense, then the BLAS",
)
