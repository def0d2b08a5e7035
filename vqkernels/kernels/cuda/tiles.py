"""The host half of include/gather.cuh: how codes are cut into tiles, and where entries lie.

A tile is 64 output features; a chunk is what a lane's one load of codes covers. What a problem
rules out of a config falls back to the nearest that it allows, so that every config is valid:
`Tiling` holds what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels.parts import code_grid, codebook_sets
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tensor import QuantizedTensor

__all__ = ["BIG", "WARP", "Slots", "Tiling", "pack_codes"]

WARP = 32

# Entries from which on a stage is kept in shared memory in part only: 64 KB of 8 fp16 values each.
BIG = 4096
_BANKS = 128  # bytes that shared memory serves at once
_ENTRY_ROW = 256  # bytes that a byte of code counts where it is moved up by one
_ROUND_BYTES = 32 << 10  # that warps exchange their sums through
_MOST_BYTES = 1 << 17  # products of two bytes that an int32 holds
_TOKENS = {"a": 8, "b": 16, "split": 4, "bytes": 8}  # of one mma


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where pieces of entries lie in shared memory, in bytes; `set_bytes` of one codebook set.

    slot: of each piece of each stage. stride: between a stage's entries. copies, resident: of a
    stage's entries, how many times and how many. by_byte: whether a code byte one place up is the
    offset.
    """

    slot: tuple[int, ...]
    stride: tuple[int, ...]
    copies: tuple[int, ...]
    resident: tuple[int, ...]
    by_byte: tuple[bool, ...]
    set_bytes: int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A config on a problem."""

    config: Config
    problem: Problem

    @functools.cached_property
    def variant(self) -> str:
        """The config's, where the format has it: bytes needs int8 entries, split 16-byte pieces."""
        wanted = self.config.text("variant")
        if wanted == "bytes" and not self.has_bytes:
            return "a"
        if wanted == "split" and self.problem.spec.vector_length == 4:
            return "a"
        return wanted

    @property
    def has_bytes(self) -> bool:
        """Whether int8 entries can be multiplied as they are, with one scale a stage."""
        spec = self.problem.spec
        scaled = spec.codebook_dtype == "int8" and self.column_sets == 1
        summed = self.problem.k <= _MOST_BYTES
        return scaled and summed and self.along_in and spec.vector_length % 8 == 0

    @property
    def tokens(self) -> int:
        """Tokens of a pass."""
        return max(_TOKENS[self.variant], self.config.number("tokens"))

    @property
    def hadd2(self) -> bool:
        """Whether stages are summed in fp16: never in bf16, whose 8 bits lose a stage."""
        several = len(self.problem.spec.stages) > 1 and self.variant != "bytes"
        return several and self.problem.dtype == "float16" and self.config["combine"] == "hadd2"

    @property
    def along_in(self) -> bool:
        """Whether vectors run along the inputs."""
        return self.problem.spec.vector_axis == "in"

    @property
    def entry_bytes(self) -> int:
        """Of an entry as packed."""
        return self.problem.spec.vector_length * (1 if self.variant == "bytes" else 2)

    @property
    def pieces(self) -> int:
        """Loads of at most 16 bytes that bring an entry."""
        return max(1, self.entry_bytes // 16)

    # --------------------------------------------------------------------------------- the codes

    def code_bytes(self) -> tuple[int, ...]:
        """Bytes of a stored code of each stage."""
        return tuple(1 if entries <= 256 else 2 for entries in self.problem.spec.stages)

    @property
    def lane_codes(self) -> int:
        """Codes that a lane has of a stage in a chunk: 16 bytes of the widest."""
        return 16 // max(self.code_bytes())

    @property
    def chunk_columns(self) -> int:
        """Columns of codes in a chunk."""
        return self.lane_codes // 2 if self.along_in else 4 * self.lane_codes

    @property
    def chunks(self) -> int:
        """Chunks of a tile."""
        return -(-self.grid[1] // self.chunk_columns)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return code_grid(self.problem.spec, self.problem.n, self.problem.k)

    @property
    def tile_rows(self) -> int:
        """Rows of codes in a tile."""
        return 64 if self.along_in else 8

    @property
    def warps_k(self) -> int:
        """Warps that share a tile."""
        return min(self.config.number("warps_k"), self.config.number("warps"))

    @property
    def unit_rows(self) -> int:
        """Rows of codes that a block has in hand."""
        return self.tile_rows * (self.config.number("warps") // self.warps_k)

    @property
    def row_sets(self) -> int:
        """Codebook sets along the rows."""
        spec = self.problem.spec
        along_rows = spec.group_axis == "row"
        return codebook_sets(spec, self.problem.n, self.problem.k) if along_rows else 1

    @property
    def set_rows(self) -> int:
        """Rows of codes that share a codebook set; all rows where there is one."""
        if self.row_sets == 1:
            return self.grid[0]
        length = 1 if self.along_in else self.problem.spec.vector_length
        return self.problem.spec.group_size // length

    @property
    def set_units(self) -> int:
        """Units of a codebook set."""
        return -(-self.set_rows // self.unit_rows)

    @property
    def units(self) -> int:
        """Units in all; each set begins with one of its own."""
        return self.row_sets * self.set_units

    @property
    def code_words(self) -> int:
        """32-bit words of all codes, and of the chunks that are loaded past the last."""
        chunks = self.units * (self.unit_rows // self.tile_rows) * self.chunks
        words = WARP * self.lane_codes * sum(self.code_bytes()) // 4
        return (chunks + self.config.number("depth")) * words

    # ------------------------------------------------------------------------------- the entries

    @property
    def column_sets(self) -> int:
        """Codebook sets that a row of codes uses: subspaces and groups along the columns."""
        spec = self.problem.spec
        groups = spec.group_axis == "column"
        sets = codebook_sets(spec, self.problem.n, self.problem.k) if groups else 1
        return sets * spec.subspaces

    @functools.cached_property
    def slots(self) -> Slots:
        """The whole stages in rows of slots, then the hot entries of the first, where it is big."""
        stages = self.problem.spec.stages
        gather = min(16, self.entry_bytes)
        copies = min(self.config.number("replicas"), _BANKS // gather)
        hot = min(self.config.number("hot_entries"), stages[0]) if stages[0] > BIG else 0
        whole = [stage for stage, entries in enumerate(stages) if entries <= BIG]
        slot = [0] * (len(stages) * self.pieces)
        stride = [self.entry_bytes] * len(stages)
        end, aligned = 0, True
        size = copies * gather
        a_region = max(1, _ENTRY_ROW // size // self.pieces)  # stages
        for first in range(0, len(whole), a_region):
            region = whole[first : first + a_region]
            rows, entries = -(-self.pieces * len(region) * size // _ENTRY_ROW), 0
            entries = max(stages[stage] for stage in region)
            step = _row_bytes(self.pieces * len(region) * size, full=size == _BANKS)
            for i, stage in enumerate(region):
                stride[stage] = step
                for piece in range(self.pieces):
                    row, place = divmod((i * self.pieces + piece) * size, step)
                    slot[stage * self.pieces + piece] = end + row * entries * step + place
            end += rows * entries * step
            aligned = aligned and rows * entries * step % (256 * _ENTRY_ROW) == 0
        if hot:
            for piece in range(self.pieces):
                slot[piece] = end + piece * gather
            end += hot * self.entry_bytes
        resident = [entries if entries <= BIG else 0 for entries in stages]
        resident[0] = resident[0] or hot
        # nothing but the code in its byte of the address
        low = [
            all(at >> 8 & 255 == 0 for at in slot[stage * self.pieces : (stage + 1) * self.pieces])
            for stage in range(len(stages))
        ]
        bare = self.column_sets == 1 or (aligned and not hot)
        return Slots(
            slot=tuple(slot),
            stride=tuple(stride),
            copies=tuple(copies if stage in whole else 1 for stage in range(len(stages))),
            resident=tuple(resident),
            by_byte=tuple(
                bare and stride[stage] == _ENTRY_ROW and entries <= 256 and low[stage]
                for stage, entries in enumerate(stages)
            ),
            set_bytes=-(-end // 16) * 16,
        )

    # ---------------------------------------------------------------------------------- the sums

    @property
    def tiles(self) -> int:
        """Groups of tokens in a pass, each those of one mma."""
        return self.tokens // _TOKENS[self.variant]

    @property
    def blocks(self) -> int:
        """Accumulators of a lane, each of four sums (of bytes: for each stage)."""
        features = {"a": 4, "b": 8, "split": 8, "bytes": 8}[self.variant]
        if not self.along_in:
            features = {"a": 4, "b": 8, "split": 2}[self.variant] * self.pieces
        return self.tiles * features

    @property
    def outputs(self) -> int:
        """Sums that a lane has of a block in the end."""
        if self.variant == "bytes":
            return 2
        return 1 if self.variant == "split" and self.along_in else 4

    @property
    def round(self) -> int:
        """Blocks that warps exchange at once."""
        a_block = self.config.number("warps") * WARP * self.outputs * 4
        return math.gcd(self.blocks, 1 << max(0, (_ROUND_BYTES // a_block).bit_length() - 1))

    @property
    def round_at(self) -> int:
        """Where they do, behind the codebooks."""
        return self.column_sets * self.slots.set_bytes

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        if self.warps_k == 1:
            return self.round_at
        return self.round_at + self.config.number("warps") * WARP * self.outputs * 4 * self.round


def _row_bytes(size: int, *, full: bool) -> int:
    """The bytes between entries whose slots take `size`: a power of two."""
    if full or size >= _ENTRY_ROW:
        return _ENTRY_ROW  # so that an address is one instruction, at twice the memory for one slot
    return 1 << (size - 1).bit_length()


def pack_codes(tensor: QuantizedTensor, tiling: Tiling) -> Tensor:
    """Codes as int32 words `[chunks, words]`, tile by tile: each stage's lanes side by side."""
    codes, (rows, columns) = tensor.parts["codes"], tiling.grid
    set_rows, padded_rows = tiling.set_rows, tiling.set_units * tiling.unit_rows
    stages = []
    for stage, size in enumerate(tiling.code_bytes()):
        plane = codes[..., stage].to(torch.int32 if size == 2 else torch.uint8)
        plane = plane.to(torch.int16) if size == 2 else plane
        width = tiling.chunks * tiling.chunk_columns - columns
        plane = functional.pad(plane, (0, width, 0, tiling.row_sets * set_rows - rows))
        plane = plane.view(tiling.row_sets, set_rows, -1)
        plane = functional.pad(plane, (0, 0, 0, padded_rows - set_rows))
        lanes = _lanes(plane.reshape(-1, plane.shape[-1]), tiling)
        stages.append(lanes.contiguous().view(torch.uint8).flatten(0, 1).flatten(1))
    words = torch.cat(stages, dim=1)
    return functional.pad(words, (0, 0, 0, tiling.config.number("depth"))).view(torch.int32)


def _lanes(plane: Tensor, tiling: Tiling) -> Tensor:
    """`[tiles, chunks, 32, codes]` of a padded stage's `[rows, columns]`."""
    chunks, codes = tiling.chunks, tiling.lane_codes
    if tiling.along_in:
        cut = plane.view(-1, 8, 8, chunks, codes // 8, 4)  # tile, r, g, chunk, quad, t
        return cut.permute(0, 3, 2, 5, 1, 4).reshape(-1, chunks, WARP, codes)
    cut = plane.view(-1, 8, chunks, 4, codes)  # tile, g, chunk, t, number
    return cut.permute(0, 2, 1, 3, 4).reshape(-1, chunks, WARP, codes)
