"""naive: codes as stored, one lookup a lane, an FMA a stage; any spec that Triton can tile.

codes: `[rows, columns, stages]`. The loop is in `gemv`; one token a program, no spans: the
yardstick of the others.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.kernels.triton import gemv, traits
from vqkernels.kernels.triton.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space

SPACE = Space(
    params=(
        Param("layout", ("cells",), "codes as stored"),
        Param("tokens", (1,), "a token a program"),
        Param("splits", (1,), "all of k in one program"),
        Param("tile_rows", (8, 16, 32), "rows of codes a program"),
        Param("tile_cells", (16, 32), "cells a step"),
        Param("warps", (4, 8), "warps a program"),
    )
)


def supports(problem: Problem, device: Device) -> str | None:
    """Up to four stages of vectors that are a power of two long."""
    return traits.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """The smallest tile."""
    return Config(layout="cells", tokens=1, splits=1, tile_rows=8, tile_cells=16, warps=4)


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product, stage by stage."""
    return (gemv.program(config, problem, fused=False),)


KERNEL = Kernel(
    name="naive",
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
    about="one lookup a lane from the stored codes, any spec",
)
