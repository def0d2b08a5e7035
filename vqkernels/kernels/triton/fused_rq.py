"""fused_rq: the stages of a cell summed in registers, then one FMA a token; one pass over x.

Any layout of the codes. Summing costs an add a stage, once for all tokens, where `vectorized`
multiplies each stage for each token; the loop is in `gemv`.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.kernels import layout
from vqkernels.kernels.triton import gemv, traits
from vqkernels.kernels.triton.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space

SPACE = Space(
    params=(
        Param("layout", layout.LAYOUTS, "order of the codes"),
        Param("tokens", (1, 2, 4), "tokens that share a decode"),
        Param("splits", (1, 2, 4, 8, 16), "spans of k summed apart"),
        Param("tile_rows", (2, 4, 8, 16), "rows of codes a program"),
        Param("tile_cells", (16, 32, 64, 128), "cells a step"),
        Param("warps", (2, 4, 8), "warps a program"),
    ),
    constraints=(gemv.REGISTERS,),
)


def supports(problem: Problem, device: Device) -> str | None:
    """Two to four stages of vectors that are a power of two long."""
    if len(problem.spec.stages) == 1:
        return "one stage leaves nothing to fuse; triton/vectorized is the same loop"
    return traits.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """A wide step over few rows, and enough spans to fill the multiprocessors."""
    return gemv.default(problem, device)


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product of summed stages."""
    return (gemv.program(config, problem, fused=True),)


KERNEL = Kernel(
    name="fused_rq",
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
    work=gemv.worker(programs),
    about="stages summed in registers, one FMA a token",
)
