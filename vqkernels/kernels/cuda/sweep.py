"""The host half of include/sweep.cuh: what fused_rq, vectorized and staged choose alike."""

from __future__ import annotations

from collections.abc import Mapping

from vqkernels.device import Device
from vqkernels.kernels import gathers, launches, layout
from vqkernels.kernels.access import LANES, LINE, SECTOR, strided_wavefronts
from vqkernels.kernels.cuda import counts, product
from vqkernels.kernels.cuda.counts import Codes
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.gathers import Gather
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param
from vqkernels.work import Work

__all__ = ["BLOCKS", "PARAMS", "REGISTERS", "defaults", "parts", "program", "room", "work"]

WARP = 32

BLOCKS = (64, 128, 132, 264, 528, 1056, 4096)

PARAMS = (
    Param("tokens", (1, 2, 4, 8), "tokens that share a decode"),
    Param("rows", (1, 2, 4, 8), "rows of codes a warp has in hand"),
    Param("splits", (1, 2, 4, 8, 16, 32), "spans of k summed apart"),
    Param("warps", (1, 2, 4, 8, 16), "warps a block"),
    Param("blocks", BLOCKS, "at most so many blocks along the rows"),
)

# A sum a row and token along in, and `vector_length` along out; x of every token, a vector each.
# Within 255 registers beside codes and addresses.
REGISTERS = Constraint(
    "at most 16 rows times tokens a warp", lambda c: c.number("rows") * c.number("tokens") <= 16
)


def lane_codes(config: Config, problem: Problem) -> int:
    """Neighbouring codes that a lane takes at once."""
    if config.text("layout") != "words":
        return 1
    return config.number("load_bytes") * 8 // layout.code_bits(problem)


def parts(config: Config, problem: Problem) -> tuple[int, int]:
    """Spans and their columns: a lane's codes lie in one span."""
    return product.spans(problem, config.number("splits"), lane_codes(config, problem))


def defaults(problem: Problem, device: Device, codes: int) -> dict[str, int]:
    """tokens, rows, splits, warps and blocks: enough warps to keep every multiprocessor busy.

    codes: that a lane takes at once.
    """
    code_rows, columns = code_grid(problem.spec, problem.n, problem.k)
    length = problem.spec.vector_length
    along_out = problem.spec.vector_axis == "out"
    # sums of a warp: rows * tokens, each a vector along out; 32 fp32 registers hold them
    room = max(1, 32 // length if along_out else 16)
    tokens = max(t for t in (1, 2, 4, 8) if t == 1 or (t <= problem.m and t * length <= 32))
    tokens = min(tokens, room)
    rows = max(r for r in (1, 2, 4) if r == 1 or r * tokens <= room)
    warps_wanted = 16 * device.units
    warps_there = -(-code_rows // rows) * -(-problem.m // tokens)
    most = max(1, columns // (WARP * codes))
    splits = max(
        s for s in (1, 2, 4, 8, 16, 32) if s == 1 or (s <= most and s * warps_there <= warps_wanted)
    )
    return {"tokens": tokens, "rows": rows, "splits": splits, "warps": 4, "blocks": 4096}


def program(
    kernel: str,
    config: Config,
    problem: Problem,
    constants: Mapping[str, int | bool],
    *,
    shared_bytes: int = 0,
    resident: str = "",
) -> Program:
    """The program of a kernel whose text calls `sweep`, with the constants of its own."""
    code_layout, warps = config.text("layout"), config.number("warps")
    rows, tokens = config.number("rows"), config.number("tokens")
    code_rows, _ = code_grid(problem.spec, problem.n, problem.k)
    spans, span = parts(config, problem)
    tiles = -(-code_rows // (rows * warps))
    return Program(
        kernel=kernel,
        types=product.types(problem, code_layout, spans),
        constants={
            **product.constants(problem, code_layout),
            "ROWS": rows,
            "TOKENS": tokens,
            **constants,
        },
        numbers=product.numbers(problem, code_layout, span),
        grid=(min(tiles, config.number("blocks")), -(-problem.m // tokens), spans),
        threads=WARP * warps,
        shared_bytes=shared_bytes,
        resident=resident,
    )


# ------------------------------------------------------------------------------------------------
# work

# Instructions: a step's loop, a code's test for the end of its span, the address of an x, and of a
# sum five shuffles, five additions and the store.
_STEP, _LAST, _X_ADDRESS, _SUM = 8, 2, 2, 14


def room(program: Program, problem: Problem, device: Device) -> int:
    """Bytes of L1 for codebooks: beside shared memory and the x of a block's span."""
    blocks = program.grid[0] * program.grid[1] * program.grid[2]
    whole = launches.l1_room(device, blocks, program.shared_bytes)
    return whole - min(
        whole // 2, gathers.inputs_bytes(problem) // (program.grid[1] * program.grid[2])
    )


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
    one = _Sweep(program, config, problem, gather)
    blocks = program.grid[0] * program.grid[1] * program.grid[2]
    warps = config.number("warps")
    x_bytes = gathers.inputs_bytes(problem)
    held = min(program.grid[0], device.units)
    if x_bytes // (program.grid[1] * program.grid[2]) > room(program, problem, device):
        held = one.tiles
    codes = layout.codes_bytes(problem, config.text("layout"))
    books = gathers.packed_books(problem)
    fills = blocks * filled_bytes
    fill_accesses = fills * copies / LINE
    launch = Work(
        hbm_bytes=launches.streamed(codes, program.grid[1], device) + books + x_bytes + one.y_final,
        l2_bytes=one.l2_bytes
        + held * x_bytes
        + fills
        + min(blocks, device.units) * gather.held_bytes,
        wavefronts=one.wavefronts + 2 * fill_accesses,
        instructions=one.instructions + 6 * fill_accesses / 4,
        blocks=blocks,
        warps=warps,
        registers=one.registers,
        shared_bytes=program.shared_bytes,
        hbm_trips=one.longest + 1,
        l2_trips=one.longest * one.codes * gather.l2_trips + 2 * bool(fills),
        shared_trips=one.longest * one.codes,
    )
    parts = program.grid[2]
    return launch, *launches.after_spans(problem, parts), *launches.surrounding(problem)


class _Sweep:
    """Totals of one `vq::sweep`, but for x, codebooks and what a block copies at first."""

    def __init__(self, program: Program, config: Config, problem: Problem, gather: Gather) -> None:
        spec = problem.spec
        rows, tokens = config.number("rows"), config.number("tokens")
        length, stages = spec.vector_length, len(spec.stages)
        along_in = spec.vector_axis == "in"
        outputs, inputs = (1, length) if along_in else (length, 1)
        code_rows, columns = code_grid(spec, problem.n, problem.k)
        parts, token_tiles = program.grid[2], program.grid[1]
        self.codes = lane_codes(config, problem)
        self.tiles = -(-code_rows // rows)
        tiles = self.tiles * token_tiles
        steps, longest = gathers.span_steps(columns, program.numbers["span"], LANES * self.codes)
        turns = -(-self.tiles // (program.grid[0] * config.number("warps")))
        self.longest = turns * longest
        # lanes past the end of a span do nothing: accesses are of the lanes at work
        lanes = tiles * columns / LANES
        brought = self._brought(config, problem, rows)
        sums = rows * tokens * outputs
        x_item = problem.torch_dtype.itemsize
        x_width = gathers.wide(inputs, x_item)
        x_loads = inputs * x_item // x_width
        x_waves = strided_wavefronts(self.codes * inputs * x_item, x_width)
        self.wavefronts = lanes * (
            rows * (brought.wavefronts / self.codes + stages * gather.wavefronts)
            + tokens * x_loads * x_waves
        )
        fused = bool(program.constants["FUSED"])
        vector = (stages - 1) * length + tokens * length if fused else stages * tokens * length
        a_code = (
            _LAST
            + tokens * (_X_ADDRESS + x_loads + gathers.convert(x_item, inputs))
            + rows * (stages * gather.instructions + vector + _sets(program))
        )
        self.instructions = (
            tiles * steps * (_STEP + rows * brought.instructions + self.codes * a_code)
            + tiles * parts * sums * _SUM
        )
        y_item = 4 if parts > 1 else x_item
        stored = tokens * -(-rows * outputs * y_item // SECTOR) * SECTOR
        self.l2_bytes = lanes * rows * (brought.l2_bytes / self.codes + stages * gather.l2_bytes)
        self.l2_bytes += tiles * parts * stored
        self.y_final = 0 if parts > 1 else problem.m * program.numbers["width"] * y_item
        # addresses and a row's place, sums, x, an entry, codes
        held = 40 + 4 * rows + sums + tokens * inputs + length
        self.registers = min(255, held + rows * stages * max(1, self.codes // 4))

    def _brought(self, config: Config, problem: Problem, rows: int) -> Codes:
        if config.text("layout") == "words":
            return counts.word_codes(problem, config.number("load_bytes"))
        neighbours = rows * config.number("warps")
        return counts.lane_codes(problem, config.text("layout"), "columns", neighbours)


def _sets(program: Program) -> int:
    """Instructions that find a cell's codebook set: a load and its address for each axis."""
    return 4 * (bool(program.constants["ROW_SETS"]) + bool(program.constants["COLUMN_SETS"]))
