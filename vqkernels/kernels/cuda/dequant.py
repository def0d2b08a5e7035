"""dequant: decode the whole weight to a dense matrix in x's dtype, then the BLAS.

The dense matrix is `[rows, columns * vector_length]` along in and its transpose
`[columns, rows * vector_length]` along out, so that entries are stored whole either way. It lives
for the call: two bytes a weight, written and read once more. Pays where m is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels import gathers, launches, layout
from vqkernels.kernels.access import LANES, LINE
from vqkernels.kernels.cuda import counts, product
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.linear import core_shape, surround
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.work import Work

SPACE = Space(
    params=(
        Param("layout", layout.LAYOUTS, "order of the codes"),
        Param("threads", (64, 128, 256, 512), "cells a block"),
    )
)


def supports(problem: Problem, device: Device) -> str | None:
    """What every CUDA kernel takes."""
    return product.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """Codes in the order in which neighbouring threads take cells."""
    along_in = problem.spec.vector_axis == "in"
    return Config(layout="planes" if along_in else "columns", threads=256)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Codes and codebooks; a dense weight for the call."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    base = product.footprint(config, problem, 1)
    dense = rows * columns * spec.vector_length
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    workspace = dense * problem.torch_dtype.itemsize + 8 * problem.m * (width_x + width_y)
    flops = problem.flops + dense * (len(spec.stages) - 1)
    return Footprint(base.weight_bytes, workspace, flops)


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """The decode."""
    code_layout, threads = config.text("layout"), config.number("threads")
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    return (
        Program(
            kernel="dequant",
            types=product.types(problem, code_layout, 1),
            constants=product.constants(problem, code_layout),
            numbers=product.numbers(problem, code_layout, columns),
            grid=(-(-rows * columns // threads), 1, 1),
            threads=threads,
        ),
    )


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """Decode, then one BLAS product."""
    (decode,) = programs(config, problem)
    launch = Launcher(decode, device)
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    along_in = problem.spec.vector_axis == "in"
    length = problem.spec.vector_length
    shape = (rows, columns * length) if along_in else (columns, rows * length)

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        dense = torch.empty(shape, dtype=x.dtype, device=x.device)
        launch({**product.arrays_of(packed), "out": dense})
        out.copy_(x @ (dense.T if along_in else dense))

    return surround(core, problem)


# Instructions of a thread beside its loads, sums and stores: its cell's row and column by division.
_CELL = 90


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """The decode, the BLAS, and the copy into `out`."""
    (program,) = programs(config, problem)
    spec, code_layout = problem.spec, config.text("layout")
    rows, columns = code_grid(spec, problem.n, problem.k)
    length, stages = spec.vector_length, len(spec.stages)
    along = "columns" if spec.vector_axis == "in" else "rows"
    gather = counts.global_gather(problem, launches.l1_room(device, program.grid[0], 0))
    # a block's cells lie in one row or few: nothing across is of use
    codes = counts.lane_codes(problem, code_layout, along, 1)
    itemsize = problem.torch_dtype.itemsize
    a_store = gathers.wide(length, itemsize)
    stores = length * itemsize // a_store
    a_cell = _CELL + codes.instructions + stages * gather.instructions + (stages - 1) * length
    a_cell += stores + (length // 2 if itemsize == 2 else 0)
    dense = rows * columns * length * itemsize
    warps = -(-rows * columns // LANES)
    books = gathers.packed_books(problem)
    decode = Work(
        hbm_bytes=layout.codes_bytes(problem, code_layout)
        + books
        + launches.streamed_after_write(dense, device),
        l2_bytes=warps * (codes.l2_bytes + stages * gather.l2_bytes)
        + min(program.grid[0], device.units) * gather.held_bytes
        + dense,
        wavefronts=warps * (codes.wavefronts + stages * gather.wavefronts) + dense / LINE,
        instructions=warps * a_cell,
        blocks=program.grid[0],
        warps=config.number("threads") // LANES,
        registers=24 + length,
        hbm_trips=1,
        l2_trips=gather.l2_trips,
        shared_trips=1,
    )
    return decode, *launches.dense_product(problem, device), *launches.surrounding(problem)


KERNEL = Kernel(
    name="dequant",
    op="linear",
    backend="cuda",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=product.pack,
    compile=compile,
    programs=programs,
    work=work,
    about="decode to a dense matrix, then the BLAS",
    rounds_weights=True,
)
