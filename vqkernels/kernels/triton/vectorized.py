"""vectorized: 16 codes a load, entries loaded whole, an FMA a stage.

Codes in planes `[stages, rows, columns]`, so that a thread's codes are 16 contiguous bytes where
rows of codes are a multiple of 16; an fp16 entry of 8 is one 16-byte load. The loop is in `gemv`.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.kernels.triton import gemv, layout
from vqkernels.kernels.triton.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space

SPACE = Space(
    params=(
        Param("layout", ("planes", "columns", "packed"), "order of the codes"),
        Param("tokens", (1, 2, 4), "tokens that share a decode"),
        Param("splits", (1, 2, 4, 8, 16), "spans of k summed apart"),
        Param("tile_rows", (2, 4, 8, 16), "rows of codes a program"),
        Param("tile_cells", (16, 32, 64, 128), "cells a step"),
        Param("warps", (2, 4, 8), "warps a program"),
    ),
    constraints=(gemv.REGISTERS,),
)


def supports(problem: Problem, device: Device) -> str | None:
    """Up to four stages of vectors that are a power of two long."""
    return layout.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """A wide step over few rows, and enough spans to fill the multiprocessors."""
    return gemv.default(problem, device)


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product, stage by stage."""
    return (gemv.program(config, problem, fused=False),)


KERNEL = Kernel(
    name="vectorized",
    op="linear",
    backend="triton",
    space=SPACE,
    supports=supports,
    default=default,
    footprint=gemv.footprint,
    pack=gemv.pack,
    compile=gemv.compiler(programs),
    programs=programs,
    about="16 codes a load, whole-entry loads, an FMA a stage",
)
