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
from vqkernels.kernels import layout
from vqkernels.kernels.cuda import around, product
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.kernels.cuda.program import Program
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space

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
    workspace = dense * problem.torch_dtype.itemsize + around.workspace_bytes(problem, 1)
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

    def core(packed: Packed, x: Tensor, y: Tensor) -> None:
        dense = torch.empty(shape, dtype=x.dtype, device=x.device)
        launch({**product.arrays_of(packed), "out": dense})
        torch.mm(x, dense.T if along_in else dense, out=y.view(problem.m, -1))

    return around.surround(core, problem, device, sums=problem.torch_dtype)


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
    about="decode to a dense matrix, then the BLAS",
    rounds_weights=True,
)
