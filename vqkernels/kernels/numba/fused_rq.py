"""fused_rq: all stages of a cell summed in registers, then one multiply-add a token.

Same words and loop as `vectorized` (`cells`, `gather`); the sum of the stages costs an add each,
once for all tokens, where multiplying stage by stage costs an FMA each for every token.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel
from vqkernels.kernels.numba import gather
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config


def supports(problem: Problem, device: Device) -> str | None:
    """Formats with stages to fuse."""
    if len(problem.spec.stages) == 1:
        return "one stage leaves nothing to fuse; numba/vectorized is the same loop"
    return gather.supports(problem, device)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """The gather loop's bytes; a product a weight, and an add for each further stage."""
    base = gather.footprint(config, problem, device)
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    adds = rows * columns * problem.spec.vector_length * (len(problem.spec.stages) - 1)
    return Footprint(base.weight_bytes, base.workspace_bytes, problem.flops + adds)


KERNEL = Kernel(
    name="fused_rq",
    op="linear",
    backend="numba",
    runs_on=("cpu",),
    space=gather.SPACE,
    supports=supports,
    default=gather.default,
    footprint=footprint,
    pack=gather.pack,
    compile=gather.compiler(fused=True),
    about="stages summed in registers, one FMA a token",
)
