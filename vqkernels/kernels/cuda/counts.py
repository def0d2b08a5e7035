"""Work of the CUDA kernels, counted from the loops of naive.cuh, sweep.cuh and dequant.cuh.

Instructions are what NVRTC 13.0 makes of a loop's body for sm_90, which the tests compare with the
machine code.
"""

from __future__ import annotations

import dataclasses

from vqkernels.kernels import gathers, layout
from vqkernels.kernels.access import LANES, LINE, SECTOR, strided_wavefronts
from vqkernels.kernels.gathers import Gather
from vqkernels.kernels.linear import set_axes
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec

__all__ = [
    "Codes",
    "global_gather",
    "lane_codes",
    "mixed",
    "set_address",
    "shared_gather",
    "word_codes",
]

# Of a code: its shift and mask, and the address of an entry in global or in shared memory.
_UNPACK, _GLOBAL_ADDRESS, _SHARED_ADDRESS = 2, 2, 4
# Of a load of codes besides itself: the address; in the layout `packed` all of two loads, the
# funnel shift and the test for a last word.
_CODE_ADDRESS, _PACKED = 2, 11


def shared_gather(problem: Problem, gather_bytes: int, copies: int) -> Gather:
    """From all codebooks in shared memory."""
    return gathers.from_shared(problem, gather_bytes, copies, _UNPACK + _SHARED_ADDRESS)


def global_gather(problem: Problem, room: int) -> Gather:
    """From global memory, through an L1 with `room` bytes for codebooks."""
    return gathers.from_global(problem, room, _UNPACK + _GLOBAL_ADDRESS)


def set_address(spec: CodebookSpec) -> int:
    """Instructions that find a cell's codebook set: a load and its address for each axis."""
    return 4 * sum(set_axes(spec))


def mixed(hot: Gather, cold: Gather, problem: Problem, share: float) -> Gather:
    """`share` of the first stage's lanes gather from `hot`, all others from `cold`."""
    stages = problem.spec.stages
    lanes = share / len(stages)
    # what the L1 misses is in proportion to a codebook's size
    missed = 1 - share * stages[0] / sum(stages)
    goes_hot, goes_cold = 1 - (1 - share) ** LANES, 1 - share**LANES
    # of the first stage a warp goes both ways; and the branch: compare, set and rejoin
    first = goes_hot * hot.instructions + goes_cold * cold.instructions + 4
    return Gather(
        pieces=cold.pieces,
        wavefronts=lanes * hot.wavefronts + (1 - lanes) * cold.wavefronts,
        l2_bytes=missed * cold.l2_bytes,
        instructions=(first + (len(stages) - 1) * cold.instructions) / len(stages),
        l2_trips=min(1.0, missed * LANES * cold.l2_trips),
        held_bytes=cold.held_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Codes:
    """A warp's load of codes, all stages: one a lane, or several in the layout `words`."""

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
