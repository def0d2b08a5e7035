"""Work of the CUDA kernels, counted from the loops of naive.cuh, sweep.cuh and dequant.cuh.

Instructions are what nvcc 13 makes of a loop's body for sm_90, which the tests compare with the
machine code; the counts below are a lane's, so a warp's.
"""

from __future__ import annotations

import dataclasses
import math

from vqkernels.kernels import layout
from vqkernels.kernels.access import (
    LANES,
    LINE,
    LINES_A_WAVEFRONT,
    SECTOR,
    gather_wavefronts,
    l1_misses,
    strided_wavefronts,
)
from vqkernels.kernels.cuda import product
from vqkernels.kernels.linear import core_shape
from vqkernels.parts import code_grid
from vqkernels.problem import Problem

__all__ = [
    "Codes",
    "Gather",
    "convert",
    "global_gather",
    "inputs_bytes",
    "lane_codes",
    "mixed",
    "shared_gather",
    "span_steps",
    "wide",
    "word_codes",
]

# Of a code: its shift and mask, and the address of an entry in global or in shared memory.
_UNPACK, _GLOBAL_ADDRESS, _SHARED_ADDRESS = 2, 2, 4
# Of a load of codes besides itself: the address; in the layout `packed` two loads, the funnel
# shift and the test for a last word.
_CODE_ADDRESS, _PACKED = 2, 11


def wide(length: int, itemsize: int, limit: int = 16) -> int:
    """Bytes that one access brings of `length` elements: `vq::wide`."""
    count = 1
    while length % (2 * count) == 0 and 2 * count * itemsize <= limit:
        count *= 2
    return count * itemsize


@dataclasses.dataclass(frozen=True)
class Gather:
    """What a warp's gather of one entry a lane costs, the mean of all stages.

    instructions: of code and address, the accesses and the conversion to fp32. held_bytes: what
    every multiprocessor that gathers reads once into its L1, and then holds.
    """

    wavefronts: float
    l2_bytes: float
    instructions: float
    l2_trips: float
    held_bytes: int = 0


def convert(itemsize: int, length: int) -> int:
    """Instructions that make `length` values fp32: one each where they are not."""
    return length if itemsize == 2 else 0


def shared_gather(problem: Problem, gather_bytes: int, copies: int) -> Gather:
    """From all codebooks in shared memory, `copies` side by side."""
    itemsize, length = layout.books_dtype(problem).itemsize, problem.spec.vector_length
    width = wide(length, itemsize, gather_bytes)
    pieces = length * itemsize // width
    stages = problem.spec.stages
    stride = length * itemsize * copies
    waves = [gather_wavefronts(width, stride, entries, copies) for entries in stages]
    instructions = _UNPACK + _SHARED_ADDRESS + pieces + convert(itemsize, length)
    return Gather(pieces * sum(waves) / len(stages), 0.0, instructions, 0.0)


def global_gather(problem: Problem, room: int) -> Gather:
    """From global memory, through an L1 with `room` bytes for codebooks."""
    itemsize, length = layout.books_dtype(problem).itemsize, problem.spec.vector_length
    entry = length * itemsize
    width = wide(length, itemsize)
    pieces = entry // width
    stages = problem.spec.stages
    misses = l1_misses(product.book_entries(problem) * entry, room)
    waves = [
        max(gather_wavefronts(width, entry, e), _lines(e * entry) / LINES_A_WAVEFRONT)
        for e in stages
    ]
    sectors = max(1, entry // SECTOR)
    return Gather(
        wavefronts=pieces * sum(waves) / len(stages),
        l2_bytes=LANES * misses * sectors * SECTOR,
        instructions=_UNPACK + _GLOBAL_ADDRESS + pieces + convert(itemsize, length),
        l2_trips=min(1.0, LANES * misses),
        held_bytes=0 if misses else product.book_entries(problem) * entry,
    )


def mixed(hot: Gather, cold: Gather, share: float) -> Gather:
    """`share` of the lanes gather from `hot`, the others from `cold`; a warp goes both ways."""
    both = 1 - share**LANES, 1 - (1 - share) ** LANES
    return Gather(
        wavefronts=share * hot.wavefronts + (1 - share) * cold.wavefronts,
        l2_bytes=(1 - share) * cold.l2_bytes,
        # and the branch: compare, set and rejoin
        instructions=both[1] * hot.instructions + both[0] * cold.instructions + 4,
        l2_trips=min(1.0, (1 - share) * LANES * cold.l2_trips),
        held_bytes=cold.held_bytes,
    )


def _lines(nbytes: int) -> float:
    """Different lines of 128 bytes that 32 random picks among `nbytes` are expected to touch."""
    lines = max(1, nbytes // LINE)
    return lines * (1 - (1 - 1 / lines) ** LANES)


@dataclasses.dataclass(frozen=True)
class Codes:
    """What a warp's load of one code a lane and stage costs, all stages.

    lane_codes: neighbouring codes of one load, in the layout `words`. l2_bytes: every code once.
    """

    wavefronts: float
    l2_bytes: float
    instructions: float


def lane_codes(problem: Problem, code_layout: str, along: str, neighbours: int) -> Codes:
    """Codes of neighbouring `along` (columns or rows), one a lane.

    neighbours: codes across that direction that the block takes soon after, for which a sector
    stays in L1.
    """
    spec, stages = problem.spec, len(problem.spec.stages)
    rows, columns = code_grid(spec, problem.n, problem.k)
    if code_layout == "packed":
        row_bytes = 4 * layout.numbers(problem)["WORDS"]
        stride = row_bytes if along == "rows" else max(1, spec.vector_bits // 8)
        nbytes = LANES * spec.vector_bits / 8
        waves = 2 * stages * strided_wavefronts(stride, 4)
        return Codes(waves, nbytes, stages * _PACKED)
    one = layout.code_bits(problem) // 8
    strides = {
        ("cells", "columns"): stages * one,
        ("cells", "rows"): columns * stages * one,
        ("planes", "columns"): one,
        ("planes", "rows"): columns * one,
        ("columns", "columns"): rows * one,
        ("columns", "rows"): one,
    }
    stride = strides[code_layout, along]
    # lanes far apart bring a sector each; what else it holds is of use to those across
    far = stages * one < stride and stride >= SECTOR
    nbytes = LANES * stages * (SECTOR / min(SECTOR // one, neighbours) if far else one)
    waves = stages * strided_wavefronts(stride, one)
    return Codes(waves, nbytes, stages * (1 + _CODE_ADDRESS))


def word_codes(problem: Problem, load_bytes: int) -> Codes:
    """`load_bytes` of codes a lane and stage, side by side."""
    stages = len(problem.spec.stages)
    return Codes(
        stages * LANES * load_bytes / LINE,
        stages * LANES * load_bytes,
        stages * (1 + _CODE_ADDRESS),
    )


def inputs_bytes(problem: Problem) -> int:
    """Bytes of x as the kernel reads it."""
    width_x, _ = core_shape(problem.spec, problem.n, problem.k)
    return problem.m * width_x * problem.torch_dtype.itemsize


def span_steps(columns: int, span: int, step: int) -> tuple[int, int]:
    """Steps of `step` columns that all spans take together, and the longest span."""
    whole, rest = divmod(columns, span)
    longest = math.ceil(min(span, columns) / step)
    return whole * math.ceil(span / step) + math.ceil(rest / step), longest
