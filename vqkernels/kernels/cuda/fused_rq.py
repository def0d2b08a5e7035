"""fused_rq: all residual stages summed in registers, one pass over x.

A lane decodes a cell at a time, whatever the number of stages, and multiplies the sum with every
token of its tile: the decode is paid once for TOKENS products. Codes in any layout.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel
from vqkernels.kernels import layout
from vqkernels.kernels.cuda import counts, product, sweep, sweep_work
from vqkernels.kernels.cuda.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.work import Work

SPACE = Space(
    params=(Param("layout", layout.LAYOUTS, "order of the codes"), *sweep.PARAMS),
    constraints=(sweep.REGISTERS,),
)


def supports(problem: Problem, device: Device) -> str | None:
    """What every CUDA kernel takes, up to 65,535 tokens."""
    return product.unsupported_product(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """The stages of a cell side by side: one row of codes is one stream."""
    return Config(layout="cells", **sweep.defaults(problem, device, 1))


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """No shared memory."""
    return product.footprint(config, problem, sweep.parts(config, problem)[0])


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product, stages first."""
    return (sweep.program("fused_rq", config, problem, {"FUSED": True}),)


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """Entries from L1, or from L2 where the codebooks are larger."""
    (program,) = programs(config, problem)
    gather = counts.global_gather(problem, sweep_work.room(program, problem, device))
    return sweep_work.work(program, config, problem, device, gather)


KERNEL = Kernel(
    name="fused_rq",
    op="linear",
    backend="cuda",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=product.pack,
    compile=product.compiler(programs),
    programs=programs,
    work=work,
    about="all stages summed in registers, one pass over x",
)
