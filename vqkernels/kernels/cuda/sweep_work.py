"""Work of the kernels that `vq::sweep` is the loop of: fused_rq, vectorized and staged."""

from __future__ import annotations

import dataclasses
import math

from vqkernels.device import Device
from vqkernels.kernels import gathers, launches
from vqkernels.kernels.access import LANES, LINE, SECTOR, strided_wavefronts
from vqkernels.kernels.cuda import counts, sweep
from vqkernels.kernels.cuda.counts import Codes
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.gathers import Gather
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.work import Work

__all__ = ["room", "work"]

# Instructions: a step's loop, a code's test for the end of its span, the address of an x, and of a
# sum five shuffles, five additions and the store; a chunk of 16 bytes that fills shared memory.
_STEP, _LAST, _X_ADDRESS, _SUM, _FILL = 8, 2, 2, 14, 6


def room(program: Program, problem: Problem, device: Device) -> int:
    """Bytes of L1 for codebooks: beside shared memory and the x of a block's span."""
    whole = launches.l1_room(device, math.prod(program.grid), program.shared_bytes)
    return whole - min(whole // 2, _x_span(program, problem))


def work(
    program: Program,
    config: Config,
    problem: Problem,
    device: Device,
    gather: Gather,
    *,
    filled_bytes: int = 0,
    copies: int = 1,
) -> tuple[Work, ...]:
    """The launches of a call: the sweep, its partial sums, and what surrounds the product.

    gather: of one entry a lane. filled_bytes: of codebooks that every block copies to its shared
    memory, `copies` times each.
    """
    one, shape = _Cost(program, config, problem, gather), _Shape.of(program, config, problem)
    blocks, parts = math.prod(program.grid), program.grid[2]
    x_bytes = gathers.inputs_bytes(problem)
    # x stays in the L1 of every multiprocessor, or comes again for every tile of rows
    x_stays = _x_span(program, problem) <= room(program, problem, device)
    x_reads = min(program.grid[0], device.units) if x_stays else shape.row_tiles
    fill = blocks * filled_bytes
    y_item = 4 if parts > 1 else problem.torch_dtype.itemsize
    launch = Work(
        hbm_bytes=launches.memory_bytes(
            problem, config.text("layout"), program.grid[1], parts, device
        ),
        l2_bytes=shape.lanes * one.l2_bytes
        + x_reads * x_bytes
        + fill
        + min(blocks, device.units) * gather.held_bytes
        + shape.tiles * parts * one.stored(y_item),
        # what fills shared memory is read and stored
        wavefronts=shape.lanes * one.wavefronts + 2 * fill * copies / LINE,
        instructions=shape.tiles * (shape.steps * one.step + parts * one.sums * _SUM)
        + _FILL * fill * copies / 16 / LANES,
        blocks=blocks,
        warps=config.number("warps"),
        registers=one.registers,
        shared_bytes=program.shared_bytes,
        hbm_trips=shape.longest + 1,
        l2_trips=shape.longest * one.codes * gather.l2_trips + 2 * (fill > 0),
        shared_trips=shape.longest * one.codes,
    )
    return launch, *launches.after_spans(problem, parts), *launches.surrounding(problem)


def _x_span(program: Program, problem: Problem) -> int:
    """Bytes of x that a block reads: of its tokens, along its span."""
    return gathers.inputs_bytes(problem) // (program.grid[1] * program.grid[2])


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a launch's warps walk.

    row_tiles, tiles: of rows, and of rows and tokens. steps: of a tile, all spans; longest: those
    of one warp. lanes: warps' worth of columns in all tiles, for lanes past the end of a span do
    nothing.
    """

    row_tiles: int
    tiles: int
    steps: int
    longest: int
    lanes: float

    @classmethod
    def of(cls, program: Program, config: Config, problem: Problem) -> _Shape:
        rows, columns = code_grid(problem.spec, problem.n, problem.k)
        a_step = LANES * sweep.lane_codes(config, problem)
        steps, longest = gathers.span_steps(columns, program.numbers["span"], a_step)
        row_tiles = -(-rows // config.number("rows"))
        tiles = row_tiles * program.grid[1]
        turns = -(-row_tiles // (program.grid[0] * config.number("warps")))
        return cls(row_tiles, tiles, steps, turns * longest, tiles * columns / LANES)


class _Cost:
    """What a warp does: in a `step`, for one column a lane (`wavefronts`, `l2_bytes`), at the end.

    codes: of a lane in a step. sums: of a lane.
    """

    def __init__(self, program: Program, config: Config, problem: Problem, gather: Gather) -> None:
        spec = problem.spec
        self._fused = bool(program.constants["FUSED"])
        self._config, self._problem, self._gather = config, problem, gather
        self._rows, self._tokens = config.number("rows"), config.number("tokens")
        self._along_in = spec.vector_axis == "in"
        # elements of x that meet a code, and outputs of a row of codes
        self._inputs = spec.vector_length if self._along_in else 1
        self._outputs = 1 if self._along_in else spec.vector_length
        self._x_item = problem.torch_dtype.itemsize
        self._x_width = gathers.wide(self._inputs, self._x_item)
        self._x_loads = self._inputs * self._x_item // self._x_width
        self._brought = self._codes()
        self.codes = sweep.lane_codes(config, problem)
        self.sums = self._rows * self._tokens * self._outputs

    def _codes(self) -> Codes:
        code_layout = self._config.text("layout")
        if code_layout == "words":
            return counts.word_codes(self._problem, self._config.number("load_bytes"))
        neighbours = self._rows * self._config.number("warps")
        return counts.lane_codes(self._problem, code_layout, "columns", neighbours)

    @property
    def step(self) -> float:
        """Instructions."""
        spec = self._problem.spec
        stages, length = len(spec.stages), spec.vector_length
        adds = (stages - 1) * length if self._fused else 0
        products = self._tokens * length * (1 if self._fused else stages)
        x = self._x_loads + gathers.convert(self._x_item, self._inputs) + _X_ADDRESS
        row = stages * self._gather.instructions + adds + products + counts.set_address(spec)
        a_code = _LAST + self._tokens * x + self._rows * row
        return _STEP + self._rows * self._brought.instructions + self.codes * a_code

    @property
    def wavefronts(self) -> float:
        """Of codes, entries and x."""
        stages = len(self._problem.spec.stages)
        row = self._brought.wavefronts / self.codes + stages * self._gather.wavefronts
        apart = self.codes * self._inputs * self._x_item
        x = self._x_loads * strided_wavefronts(apart, self._x_width)
        return self._rows * row + self._tokens * x

    @property
    def l2_bytes(self) -> float:
        """Of codes and entries."""
        stages = len(self._problem.spec.stages)
        row = self._brought.l2_bytes / self.codes + stages * self._gather.l2_bytes
        return self._rows * row

    def stored(self, itemsize: int) -> int:
        """Bytes of a tile's sums, in whole sectors."""
        return self._tokens * -(-self._rows * self._outputs * itemsize // SECTOR) * SECTOR

    @property
    def registers(self) -> int:
        """Of addresses and the rows' places, sums, x, an entry, codes."""
        spec = self._problem.spec
        held = 40 + 4 * self._rows + self.sums + self._tokens * self._inputs + spec.vector_length
        return min(255, held + self._rows * len(spec.stages) * max(1, self.codes // 4))
