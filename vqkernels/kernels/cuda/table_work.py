"""The work of cuda/table, counted from the loops of table.cuh and table_build.cuh."""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernels import launches
from vqkernels.kernels.access import LANES
from vqkernels.kernels.cuda import around, product
from vqkernels.kernels.cuda import table_shape as shape
from vqkernels.kernels.gathers import inputs_bytes
from vqkernels.kernels.linear import core_shape
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.work import Work

__all__ = ["work"]

# Instructions that NVRTC 13.0 makes for sm_90. Of a looked-up word: the permutation, the load, and
# a tensor-core instruction for 4 registers. Of a unit: the loop, pointers and, a block, 2 loads.
_WORD, _UNIT = 2, 12
# Of 16 entries in a tile: addresses and elements; for each word of a lane exchanges and stores, and
# for each chunk of 8 elements products and x. With FMAs, of one entry: addresses and the store.
_ENTRIES, _PAIR, _CHUNK, _ENTRY = 44, 14, 48, 15
# Of a tile: barriers, and x that a warp loads and stores. Of a warp: its beginning and its end.
_TILE, _WARP = 60, 400
_MMA_FLOPS = 4096  # m16n8k16


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """The product and the launches around it; spans of a cluster are added up in it."""
    one = _Counts(config, problem)
    alone = shape.clustered(config) or one.spans == 1
    _, width = core_shape(problem.spec, problem.n, problem.k)
    y = problem.m * width * problem.torch_dtype.itemsize
    stored = y if alone else 4 * one.spans * problem.m * width
    books = 2 * product.book_entries(problem) * problem.spec.vector_length
    codes, x = shape.codes_bytes(config, problem), inputs_bytes(problem)
    launch = Work(
        hbm_bytes=launches.streamed(codes, one.passes, device) + books + x + (y if alone else 0),
        # x to find its range, and again for each tile
        l2_bytes=one.passes * codes
        + 2 * shape.row_tiles(config, problem) * x
        + min(one.blocks, device.units) * books
        + stored,
        wavefronts=one.wavefronts,
        instructions=one.instructions,
        tensor_flops=_MMA_FLOPS * one.products,
        blocks=one.blocks,
        warps=one.warps,
        registers=_registers(config, problem),
        shared_bytes=shape.shared_bytes(config, problem),
        hbm_trips=1 + one.warp_units / _units_ahead(config, problem),
        l2_trips=2 + one.block_tiles + one.warp_units * _from_l2(config),
        # a tile's entries, x, table and the last sum, one after another
        shared_trips=3 + 4 * one.block_tiles,
    )
    spans = 1 if alone else one.spans
    final = bool(around.store(problem, spans)["FINAL"])
    return around.work((launch,), problem, device, parts=spans, final=final)


class _Counts:
    """Of a whole call. Units: one stage of a warp's rows in 32 columns. Words: lookups of warps.

    tiles: that blocks build, once for each pass over stages. pieces: builds of 16 entries by tensor
    cores, or of one by FMAs.
    """

    def __init__(self, config: Config, problem: Problem) -> None:
        spec, tokens = problem.spec, config.number("tokens")
        self.warps = config.number("warps")
        self.spans, _ = shape.parts(config, problem)
        self.passes = -(-problem.m // tokens)
        blocks = shape.row_tiles(config, problem) * self.passes
        self.blocks = blocks * (config.number("splits") if shape.clustered(config) else self.spans)
        groups, columns = shape.code_shape(config, problem)
        over_stages = -(-len(spec.stages) // shape.stages_at_once(config, problem))
        tiles = blocks * columns * LANES // shape.tile_columns(config)
        units = self.passes * groups * columns * len(spec.stages)
        self.words = units * shape.warp_blocks(config, problem) * shape.BLOCK_ROWS
        self.pairs, self.chunks = (2 if tokens == 4 else 1), -(-spec.vector_length // 8)
        self.by_tensor = shape.tensor_build(config, problem)
        step = 16 if self.by_tensor else 1
        self.pieces = tiles * sum(-(-entries // step) for entries in spec.stages)
        self.units, self.tiles, self.length = units, tiles * over_stages, spec.vector_length
        self.warp_units = units / (self.blocks * self.warps)
        self.block_tiles = self.tiles / self.blocks

    @property
    def wavefronts(self) -> float:
        """Looked-up words, the codes that name them (16 bytes are 16 codes), and builds."""
        # of 16 entries: 16 stores, and x in 4 fragments of 512 bytes a chunk
        piece = 16 * (1 + self.chunks) if self.by_tensor else 1
        return self.pairs * (self.words + piece * self.pieces) + 4 * self.words / 16

    @property
    def products(self) -> float:
        """Instructions of tensor cores: 4 registers of words each, and the builds' own."""
        building = 8 * self.chunks * self.pieces if self.by_tensor else 0
        return self.pairs * (self.words / 4 + building)

    @property
    def instructions(self) -> float:
        """All that warps issue."""
        if self.by_tensor:
            piece = _ENTRIES + self.pairs * (_PAIR + _CHUNK * self.chunks)
        else:
            # an entry's elements, and for each product of a word x and an FMA
            piece = _ENTRY + self.length * (2 + 4 * self.pairs)
        lookups = self.words * (_WORD + self.pairs / 4) + self.units * _UNIT + 2 * self.words / 32
        overhead = self.tiles * self.warps * _TILE + self.blocks * self.warps * _WARP
        return lookups + self.pieces * piece + overhead


def _units_ahead(config: Config, problem: Problem) -> float:
    """Units of codes that are on their way to a warp while it waits for none."""
    blocks = shape.warp_blocks(config, problem)
    if slots := config.number("ring"):
        return slots * shape.SLOT_BYTES / (shape.BLOCK_BYTES * blocks)
    return 1 + config.number("ahead") / blocks


def _from_l2(config: Config) -> float:
    """Waits for the L2 a unit: where codes were asked for ahead, registers take them from there."""
    return 0.0 if config.number("ring") or not config.number("ahead") else 1.0


def _registers(config: Config, problem: Problem) -> int:
    """About: codes, addresses and a tile's x, and 8 sums a token and block of rows."""
    blocks = shape.warp_blocks(config, problem)
    most = 128 if config.number("warps") > 8 else 255
    return min(most, 50 + 40 * blocks + 8 * blocks * config.number("tokens"))
