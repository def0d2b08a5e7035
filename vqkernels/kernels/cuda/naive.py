"""naive: the obvious lookup. A thread owns one row of codes and one token and walks its span.

Codes, entries and x come from global memory one element or entry at a time; `columns` puts the
codes that neighbouring threads read side by side. What every other kernel is measured against.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel
from vqkernels.kernels import layout
from vqkernels.kernels.cuda import around, product
from vqkernels.kernels.cuda.program import Program
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space

SPACE = Space(
    params=(
        Param("layout", layout.LAYOUTS, "order of the codes"),
        Param("splits", (1, 2, 4, 8, 16, 32), "spans of k summed apart"),
        Param("threads", (32, 64, 128, 256), "rows of codes a block"),
    )
)


def supports(problem: Problem, device: Device) -> str | None:
    """What every CUDA kernel takes, up to 65,535 tokens."""
    return product.unsupported_product(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """Coalesced codes; spans until every multiprocessor has 512 threads."""
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    wanted = 512 * device.units // (rows * problem.m)
    splits = max(s for s in (1, 2, 4, 8, 16, 32) if s == 1 or (s <= wanted and 16 * s <= columns))
    return Config(layout="columns", splits=splits, threads=64)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """No shared memory."""
    parts, _ = product.spans(problem, config.number("splits"), 1)
    return product.footprint(config, problem, parts)


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product."""
    code_layout, threads = config.text("layout"), config.number("threads")
    rows, _ = code_grid(problem.spec, problem.n, problem.k)
    parts, span = product.spans(problem, config.number("splits"), 1)
    return (
        Program(
            kernel="naive",
            types=product.types(problem, code_layout, parts),
            constants=product.constants(problem, code_layout) | around.store(problem, parts),
            numbers=product.numbers(problem, code_layout, span),
            grid=(-(-rows // threads), problem.m, parts),
            threads=threads,
        ),
    )


KERNEL = Kernel(
    name="naive",
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
    about="a thread a row, every lookup from global memory",
)
