"""dequant: decode the whole weight to a dense matrix in x's dtype, then the BLAS.

The dense matrix is `[rows, columns * vector_length]` along in and its transpose
`[columns, rows * vector_length]` along out, so that entries are stored whole either way. It lives
for the call: two bytes a weight, written and read once more. Pays where m is large.
"""

# mypy: ignore-errors
# device functions are typed by Triton, not by annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels import gathers, launches, layout
from vqkernels.kernels.access import LANES, LINE
from vqkernels.kernels.linear import books_bytes, core_shape, sides_bytes, surround
from vqkernels.kernels.triton import gemv, traits
from vqkernels.kernels.triton.decode import sum_entries
from vqkernels.kernels.triton.program import Program, pointer_dtypes, shared_bytes
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.work import Work

SPACE = Space(
    params=(
        Param("layout", layout.LAYOUTS, "order of the codes"),
        Param("tile_rows", (4, 8, 16), "rows of codes a program"),
        Param("tile_cells", (16, 32, 64), "cells a program"),
        Param("warps", (4, 8), "warps a program"),
    )
)


@triton.jit
def dequant(
    codes, books, row_sets, column_sets, dense,
    ROWS, COLUMNS, WORDS,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
    ROW_SETS: tl.constexpr, COLUMN_SETS: tl.constexpr, ALONG_IN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_CELLS: tl.constexpr,
):  # fmt: skip
    """`dense: [ROWS, COLUMNS, LENGTH]`, or `[COLUMNS, ROWS, LENGTH]` along out."""
    row = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    cell = (tl.program_id(1) * TILE_CELLS + tl.arange(0, TILE_CELLS))[None, :]
    weight = sum_entries(
        codes, books, row_sets, column_sets, row, cell, ROWS, COLUMNS, WORDS,
        LAYOUT, BITS, ENTRIES, LENGTH, ROW_SETS, COLUMN_SETS,
    )  # fmt: skip
    at = row.to(tl.int64) * COLUMNS + cell if ALONG_IN else cell.to(tl.int64) * ROWS + row
    element = tl.arange(0, LENGTH)[None, None, :]
    inside = ((row < ROWS) & (cell < COLUMNS))[:, :, None]
    tl.store(dense + at[:, :, None] * LENGTH + element, weight, mask=inside)


def supports(problem: Problem, device: Device) -> str | None:
    """Up to four stages of vectors that are a power of two long."""
    return traits.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """16-byte loads of codes and of fp16 entries."""
    return Config(layout="planes", tile_rows=8, tile_cells=32, warps=4)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Codes and codebooks; a dense weight for the call."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    weight = layout.codes_bytes(problem, config.text("layout")) + sides_bytes(problem)
    weight += books_bytes(problem) + 4 * (rows + columns)
    dense = rows * columns * spec.vector_length
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    workspace = dense * problem.torch_dtype.itemsize + 8 * problem.m * (width_x + width_y)
    flops = problem.flops + dense * (len(spec.stages) - 1)
    return Footprint(weight, workspace, flops, shared_bytes(programs(config, problem), device))


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """The decode."""
    code_layout = config.text("layout")
    sizes = layout.numbers(problem)
    tile_rows, tile_cells = config.number("tile_rows"), config.number("tile_cells")
    return (
        Program(
            function=dequant,
            pointers=pointer_dtypes(
                codes=layout.code_dtype(problem, code_layout),
                books=layout.books_dtype(problem),
                row_sets=torch.int32,
                column_sets=torch.int32,
                dense=problem.torch_dtype,
            ),
            numbers={name: sizes[name] for name in ("ROWS", "COLUMNS", "WORDS")},
            constants={
                **traits.constants(problem, code_layout),
                "TILE_ROWS": tile_rows,
                "TILE_CELLS": tile_cells,
            },
            grid=(-(-sizes["ROWS"] // tile_rows), -(-sizes["COLUMNS"] // tile_cells), 1),
            num_warps=config.number("warps"),
        ),
    )


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """Decode, then one BLAS product."""
    (decode,) = programs(config, problem)
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    along_in = problem.spec.vector_axis == "in"
    length = problem.spec.vector_length
    shape = (rows, columns * length) if along_in else (columns, rows * length)

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        dense = torch.empty(shape, dtype=x.dtype, device=x.device)
        decode.launch({**gemv.tensors(packed), "dense": dense})
        y = x @ (dense.T if along_in else dense)
        out.copy_(y)

    return surround(core, problem)


# Instructions of a thread beside its gathers: its place, masks, and the way to its store.
_CELL = 70


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """The decode, the BLAS, and the copy into `out`."""
    (decode,) = programs(config, problem)
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    length, stages = problem.spec.vector_length, len(problem.spec.stages)
    warps, blocks = config.number("warps"), decode.grid[0] * decode.grid[1]
    tile_cells = config.number("tile_rows") * config.number("tile_cells")
    gather = gathers.from_global(problem, launches.l1_room(device, blocks, 0), 4)
    lanes = tile_cells / (LANES * warps)
    dense = rows * columns * length * problem.torch_dtype.itemsize
    a_warp = _CELL + max(1.0, lanes) * (stages * gather.instructions + length)
    codes = layout.codes_bytes(problem, config.text("layout"))
    launch = Work(
        hbm_bytes=codes
        + gathers.packed_books(problem)
        + launches.streamed_after_write(dense, device),
        l2_bytes=codes
        + rows * columns * stages * gather.l2_bytes / LANES
        + min(blocks, device.units) * gather.held_bytes
        + dense,
        wavefronts=blocks * warps * lanes * stages * (gather.wavefronts + 2) + dense / LINE,
        instructions=blocks * warps * a_warp,
        blocks=blocks,
        warps=warps,
        registers=18 + int(lanes * length / 2),
        hbm_trips=1,
        l2_trips=gather.l2_trips,
        shared_trips=3,
    )
    return launch, *launches.dense_product(problem, device), *launches.surrounding(problem)


KERNEL = Kernel(
    name="dequant",
    op="linear",
    backend="triton",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=gemv.pack,
    compile=compile,
    programs=programs,
    work=work,
    about="decode to a dense matrix, then the BLAS",
    rounds_weights=True,
)
