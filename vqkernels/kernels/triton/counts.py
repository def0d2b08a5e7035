"""Work of the Triton kernels, counted from their tiles.

What Triton makes of a tile is its own choice: instructions are fitted to the loops that Triton 3.7
compiles for sm_90, which the tests compare with the machine code within a third.
"""

from __future__ import annotations

import dataclasses
import math

from vqkernels.device import Device
from vqkernels.kernels import gathers, launches, layout
from vqkernels.kernels.access import LANES, LINE, SECTOR
from vqkernels.kernels.gathers import Gather
from vqkernels.kernels.triton.program import Program
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.work import Work

__all__ = ["Step", "Tile", "gemv_step", "global_gather", "products"]

# Instructions of a step's loop; of a gather besides its access and conversion: the code's load,
# masks, the exchange between layouts through shared memory, the address; and of a packed code more.
_STEP, _GATHER, _PACKED = 16, 7.5, 2.5


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program's step decodes: `cells` of each row of codes, for `tokens` tokens.

    lanes: cells of one lane, all rows; a share of one where there are more lanes.
    """

    rows: int
    cells: int
    tokens: int
    warps: int

    @property
    def lanes(self) -> float:
        """Cells of one lane."""
        return self.rows * self.cells / (LANES * self.warps)


@dataclasses.dataclass(frozen=True)
class Step:
    """A warp's step: everything but codes and x from the L2. registers: of a thread."""

    instructions: float
    wavefronts: float
    registers: int
    shared_trips: float = 2.0
    tensor_flops: float = 0.0


def global_gather(problem: Problem, program: Program, device: Device) -> Gather:
    """From global memory, through an L1 that also holds the x of a span."""
    blocks = math.prod(program.grid)
    whole = launches.l1_room(device, blocks, 0)
    x_span = gathers.inputs_bytes(problem) // (program.grid[1] * program.grid[2])
    packed = _PACKED if program.constants.get("LAYOUT") == "packed" else 0
    return gathers.from_global(problem, whole - min(whole // 2, x_span), _GATHER + packed)


def gemv_step(problem: Problem, tile: Tile, gather: Gather, *, fused: bool) -> Step:
    """A step of `gemv.gemv`: entries to fp32, products summed in registers."""
    length, stages = problem.spec.vector_length, len(problem.spec.stages)
    inputs = length if problem.spec.vector_axis == "in" else 1
    itemsize = problem.torch_dtype.itemsize
    # a lane with less than a cell takes a part of an entry, at the cost of a gather
    gathered = max(1.0, tile.lanes) * stages
    elements = tile.lanes * length
    products = elements * tile.tokens
    converted = gathers.convert(layout.books_dtype(problem).itemsize, length)
    a_gather = gather.instructions - converted
    instructions = _STEP + gathered * a_gather + tile.lanes * stages * converted
    instructions += (stages - 1) * elements + products if fused else stages * products
    instructions += tile.tokens * (2 + gathers.convert(itemsize, inputs))
    # codes are exchanged between lanes: stored and loaded once
    exchanged = 2 * stages * max(1.0, tile.lanes)
    inputs_waves = tile.tokens * max(1.0, tile.cells * inputs * itemsize / LINE)
    waves = tile.lanes * stages * gather.wavefronts + exchanged + inputs_waves
    registers = 32 + int(elements * (tile.tokens + 1))
    return Step(instructions, waves, registers, shared_trips=3.0)


def products(
    program: Program,
    problem: Problem,
    device: Device,
    tile: Tile,
    step: Step,
    gather: Gather,
    *,
    turns: int = 1,
    shared_bytes: int = 0,
) -> tuple[Work, ...]:
    """The launches of a call whose one program walks spans of cells in steps of a tile.

    turns: how often a program walks its span.
    """
    spec = problem.spec
    along_in = spec.vector_axis == "in"
    length, stages = spec.vector_length, len(spec.stages)
    rows, columns = code_grid(spec, problem.n, problem.k)
    parts = program.grid[2]
    steps, longest = gathers.span_steps(columns, program.numbers["SPAN"], tile.cells)
    blocks = math.prod(program.grid)
    row_programs = program.grid[0] * program.grid[1]
    warp_steps = row_programs * steps * turns * tile.warps
    x_bytes = gathers.inputs_bytes(problem)
    outputs = tile.rows * (1 if along_in else length)
    y_item = 4 if parts > 1 else problem.torch_dtype.itemsize
    y_bytes = problem.m * program.numbers["WIDTH"] * y_item
    code_layout = str(program.constants.get("LAYOUT", "words"))
    codes = layout.codes_bytes(problem, code_layout)
    cells = program.grid[1] * rows * columns
    # a lane's own sums, then five exchanges of what is left for each output
    ending = tile.tokens * (tile.lanes * length + 12 * outputs / tile.warps) + 60
    launch = Work(
        hbm_bytes=launches.memory_bytes(problem, code_layout, program.grid[1], parts, device),
        l2_bytes=program.grid[1] * codes
        + min(program.grid[0], device.units) * x_bytes
        + cells * stages * gather.l2_bytes / LANES
        + min(blocks, device.units) * gather.held_bytes
        + -(-parts * y_bytes // SECTOR) * SECTOR,
        wavefronts=warp_steps * step.wavefronts,
        instructions=warp_steps * step.instructions + blocks * tile.warps * ending,
        tensor_flops=warp_steps * step.tensor_flops,
        tensor_dtype=problem.dtype,
        blocks=blocks,
        warps=tile.warps,
        registers=min(255, step.registers),
        shared_bytes=shared_bytes,
        hbm_trips=turns * longest + 1,
        l2_trips=turns * longest * gather.l2_trips,
        shared_trips=turns * longest * step.shared_trips,
    )
    return launch, *launches.after_spans(problem, parts), *launches.surrounding(problem)
