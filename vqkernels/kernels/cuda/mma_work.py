"""Work of cuda/mma, counted from the loops of operands.cuh and mma.cuh.

Instructions are what NVRTC 13.0 makes of the loop for sm_90, which a test compares with the
machine code.
"""

from __future__ import annotations

import torch

from vqkernels.device import Device
from vqkernels.kernels import gathers, launches
from vqkernels.kernels.access import LANES, LINE, SECTOR, gather_wavefronts
from vqkernels.kernels.cuda import around
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.cuda.tiles import Tiling
from vqkernels.kernels.linear import core_shape
from vqkernels.problem import Problem
from vqkernels.work import Work

__all__ = ["Chunk", "work"]

# Instructions: of a chunk its loop; of a piece its address by a byte permute, of a code one from
# its bits; of an entry in global memory its test and address; of a sum its exchange and its store.
_CHUNK, _BY_BYTE, _BY_BITS, _COLD, _SUM = 8, 1, 3, 4, 10
# A fill's load and store of 16 bytes a lane with their addresses.
_FILL = 12
# Registers beside sums and codes: entries on their way, x, addresses.
_HELD = 120
_SPLITTING = 11  # launches of torch before a product of bytes


class Chunk:
    """What a warp does for a chunk of its tile in one pass; sums are of the whole warp.

    x_bytes: read of x. cold: the share of its gathers that go to global memory.
    """

    def __init__(self, tiling: Tiling) -> None:
        stages, slots, pieces = tiling.problem.spec.stages, tiling.slots, tiling.pieces
        codes, width = tiling.lane_codes, min(16, tiling.entry_bytes)
        sectors = -(-tiling.entry_bytes // SECTOR) * SECTOR
        loads = self._loads(tiling)
        self.l2_bytes = cold = 0.0
        self.wavefronts = loads * width / 4 + LANES * sum(tiling.code_bytes()) * codes / LINE
        self.mma = codes * pieces * tiling.tiles * self._mma_a_piece(tiling, width)
        self.instructions = self.mma + codes * pieces * self._moves(tiling, width // 4)
        self.instructions += loads * (1 + (width // 4 if tiling.variant == "b" else 0))
        self.instructions += _CHUNK + len(stages)
        for stage, entries in enumerate(stages):
            # codes are taken as even: of trained ones the hot entries serve somewhat more
            missed = 1 - slots.resident[stage] / entries
            copies = slots.copies[stage]
            waves = gather_wavefronts(width, slots.stride[stage], entries, copies)
            self.wavefronts += codes * pieces * waves
            self.l2_bytes += missed * codes * LANES * sectors
            address = _BY_BYTE * pieces if slots.by_byte[stage] else _BY_BITS
            self.instructions += codes * (pieces + address + _COLD * (missed > 0))
            cold += missed / len(stages)
        self.cold = cold
        self.x_bytes = loads * LANES * width

    def _products(self, tiling: Tiling) -> int:
        return 1 if tiling.hadd2 else len(tiling.problem.spec.stages)

    def _mma_a_piece(self, tiling: Tiling, width: int) -> float:
        """Of a piece of a code in all stages with a token tile."""
        a_stage = {"a": width / 16, "b": width / 8, "bytes": width / 8, "split": 1.0}
        return self._products(tiling) * a_stage[tiling.variant]

    def _moves(self, tiling: Tiling, words: int) -> int:
        """Of a piece: sums of stages; halves put together along out; operands whose four registers
        come from two entries.
        """
        sums = (len(tiling.problem.spec.stages) - 1) * words if tiling.hadd2 else 0
        apart = not tiling.along_in or (tiling.variant == "a" and not tiling.hadd2)
        return sums + (self._products(tiling) * words if apart else 0)

    def _loads(self, tiling: Tiling) -> int:
        """Of x: a load of a piece for each eight tokens, and of split for its four."""
        groups = tiling.lane_codes // 8 * (tiling.pieces if tiling.along_in else 1)
        # a high and a low byte of each
        return -(-tiling.tokens // 8) * groups * (2 if tiling.variant == "bytes" else 1)


def work(program: Program, tiling: Tiling, device: Device) -> tuple[Work, ...]:
    """The product and the launches around it; of bytes, torch's too."""
    problem, config = tiling.problem, tiling.config
    along_rows, passes, spans = program.grid
    blocks, warps = along_rows * passes * spans, config.number("warps")
    chunk, tiles = Chunk(tiling), tiling.units * (tiling.unit_rows // tiling.tile_rows)
    chunks = tiles * tiling.chunks * passes
    # of the warp with the most
    longest = -(-tiling.units // along_rows) * -(-tiling.chunks // (tiling.warps_k * spans))
    fills = max(blocks, tiling.row_sets * passes * spans) if tiling.row_sets > 1 else blocks
    filled = sum(tiling.slots.resident) * tiling.entry_bytes * tiling.column_sets
    stored = sum(
        kept * copies
        for kept, copies in zip(tiling.slots.resident, tiling.slots.copies, strict=True)
    )
    fill_lines = fills * stored * tiling.entry_bytes * tiling.column_sets / LINE
    # registers of sums that warps exchange, a line of shared memory each
    sums = tiles * passes * spans * tiling.warps_k * tiling.blocks * tiling.outputs
    exchanged = 2 * sums if tiling.warps_k > 1 else 0
    x_bytes, width_y = _inputs_bytes(problem), core_shape(problem.spec, problem.n, problem.k)[1]
    y_bytes = problem.m * width_y * (4 if spans > 1 or tiling.variant == "bytes" else 2)
    codes = 4 * tiling.code_words
    books = gathers.packed_books(problem) // 4 * 2
    launch = Work(
        hbm_bytes=launches.streamed(codes, passes, device)
        + books
        + x_bytes
        + (y_bytes if spans == 1 else 0),
        l2_bytes=codes * passes
        + _inputs_from_l2(tiling, program, device, chunks * chunk.x_bytes)
        + chunks * chunk.l2_bytes
        + fills * filled
        + spans * y_bytes,
        wavefronts=chunks * chunk.wavefronts + 2 * fill_lines + exchanged,
        instructions=chunks * chunk.instructions + fill_lines / 4 * _FILL + sums * _SUM,
        tensor_flops=chunks * chunk.mma * (8192 if tiling.variant == "bytes" else 4096),
        tensor_dtype="int8" if tiling.variant == "bytes" else problem.dtype,
        blocks=blocks,
        warps=warps,
        registers=_registers(tiling),
        shared_bytes=program.shared_bytes,
        hbm_trips=-(-longest // config.number("depth")) + 1,
        l2_trips=longest * (1 if chunk.cold else 0) + 2,
        shared_trips=2 * longest,
    )
    if tiling.variant != "bytes":
        final = bool(program.constants["FINAL"])
        return around.work((launch,), problem, device, parts=spans, final=final)
    x, y = launches.elementwise(2 * x_bytes, 2 * x_bytes), launches.elementwise(y_bytes, y_bytes)
    core = (*(x,) * _SPLITTING, launch, y)
    return around.work(core, problem, device, parts=spans, sums=torch.float32)


def _inputs_bytes(problem: Problem) -> int:
    return problem.m * core_shape(problem.spec, problem.n, problem.k)[0] * 2


def _inputs_from_l2(tiling: Tiling, program: Program, device: Device, read: float) -> float:
    """Of the `read` bytes of x those that a block's L1 doesn't hold from an earlier unit."""
    along_rows, passes, spans = program.grid
    a_block = tiling.tokens * _inputs_bytes(tiling.problem) // tiling.problem.m // spans
    blocks = along_rows * passes * spans
    if a_block > launches.l1_room(device, blocks, program.shared_bytes):
        return read
    # the tiles of a unit share it too
    return min(read, float(blocks * a_block))


def _registers(tiling: Tiling) -> int:
    stages = len(tiling.problem.spec.stages)
    sums = 4 * tiling.blocks * (stages if tiling.variant == "bytes" else 1)
    codes = tiling.config.number("depth") * tiling.lane_codes * sum(tiling.code_bytes()) // 4
    fragments = tiling.tokens if tiling.variant == "b" else 0
    threads = LANES * tiling.config.number("warps")
    return min(255, 65536 // threads, _HELD + sums + codes + fragments)
