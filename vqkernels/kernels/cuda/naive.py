"""naive: the obvious lookup. A thread owns one row of codes and one token and walks its span.

Codes, entries and x come from global memory one element or entry at a time; `columns` puts the
codes that neighbouring threads read side by side. What every other kernel is measured against.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel
from vqkernels.kernels import gathers, launches, layout
from vqkernels.kernels.access import LANES, SECTOR
from vqkernels.kernels.cuda import counts, product
from vqkernels.kernels.cuda.program import Program
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.work import Work

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
            constants=product.constants(problem, code_layout),
            numbers=product.numbers(problem, code_layout, span),
            grid=(-(-rows // threads), problem.m, parts),
            threads=threads,
        ),
    )


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """A warp walks the cells of its span: a code and an entry a stage, x element by element."""
    (program,) = programs(config, problem)
    spec, code_layout = problem.spec, config.text("layout")
    rows, columns = code_grid(spec, problem.n, problem.k)
    along_in = spec.vector_axis == "in"
    length, stages = spec.vector_length, len(spec.stages)
    parts, span = program.grid[2], program.numbers["span"]
    blocks = program.grid[0] * program.grid[1] * parts
    x_bytes = gathers.inputs_bytes(problem)
    room = launches.l1_room(device, blocks, 0)
    gather = counts.global_gather(problem, room - min(room // 2, x_bytes // problem.m // parts))
    codes = counts.lane_codes(problem, code_layout, "rows", span)
    inputs = length if along_in else 1
    itemsize = problem.torch_dtype.itemsize
    # a load of x is a wavefront, for it is the same for all lanes, and a conversion with it
    a_cell = codes.instructions + stages * gather.instructions + 8
    a_cell += (stages - 1) * length + length + inputs * (2 if itemsize == 2 else 1)
    cells = problem.m * (rows / LANES) * columns
    warps = -(-rows // LANES) * problem.m * parts
    outputs = (1 if along_in else length) * (4 if parts > 1 else itemsize)
    stored = warps * -(-LANES * outputs // SECTOR) * SECTOR
    # side by side in `columns`, a cell's codes are a line of their own; else of the cells beside it
    a_line = 1 if code_layout == "columns" else SECTOR * 8 // layout.code_bits(problem)
    launch = Work(
        hbm_bytes=launches.memory_bytes(problem, code_layout, problem.m, parts, device),
        l2_bytes=cells * (codes.l2_bytes + stages * gather.l2_bytes)
        + min(program.grid[0], device.units) * x_bytes
        + min(blocks, device.units) * gather.held_bytes
        + stored,
        wavefronts=cells * (codes.wavefronts + stages * gather.wavefronts + inputs),
        instructions=-(-rows // LANES) * problem.m * columns * a_cell + 40 * warps,
        blocks=blocks,
        warps=config.number("threads") // LANES,
        registers=30 + length,
        hbm_trips=min(span, columns) / a_line + 1,
        l2_trips=min(span, columns) * gather.l2_trips,
        shared_trips=min(span, columns) * (2 if a_line > 1 else 1),
    )
    return launch, *launches.after_spans(problem, parts), *launches.surrounding(problem)


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
    work=work,
    about="a thread a row, every lookup from global memory",
)
