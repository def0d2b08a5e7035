"""What a warp's gather of entries costs, for the work of GPU kernels in any language."""

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
)
from vqkernels.kernels.linear import books_bytes, core_shape
from vqkernels.problem import Problem

__all__ = [
    "Gather",
    "convert",
    "from_global",
    "from_shared",
    "inputs_bytes",
    "packed_books",
    "span_steps",
    "wide",
]


@dataclasses.dataclass(frozen=True)
class Gather:
    """A warp's gather of one entry a lane, the mean of all stages.

    pieces: accesses. instructions: all that it takes, with the code's bits and the conversion to
    fp32. held_bytes: what a multiprocessor that gathers reads once into its L1, and then holds.
    """

    pieces: int
    wavefronts: float
    l2_bytes: float
    instructions: float
    l2_trips: float = 0.0
    held_bytes: int = 0


def wide(length: int, itemsize: int, limit: int = 16) -> int:
    """Bytes that one access may bring of `length` elements: `vq::wide`."""
    count = 1
    while length % (2 * count) == 0 and 2 * count * itemsize <= limit:
        count *= 2
    return count * itemsize


def convert(itemsize: int, length: int) -> int:
    """Instructions that make `length` values fp32: one each where they are not."""
    return length if itemsize == 2 else 0


def packed_books(problem: Problem) -> int:
    """Bytes of all codebooks as packed."""
    return books_bytes(problem) // 4 * layout.books_dtype(problem).itemsize


def inputs_bytes(problem: Problem) -> int:
    """Bytes of x as a kernel reads it."""
    width_x, _ = core_shape(problem.spec, problem.n, problem.k)
    return problem.m * width_x * problem.torch_dtype.itemsize


def span_steps(columns: int, span: int, step: int) -> tuple[int, int]:
    """Steps of `step` columns that all spans take together, and those of the longest."""
    whole, rest = divmod(columns, span)
    longest = math.ceil(min(span, columns) / step)
    return whole * math.ceil(span / step) + math.ceil(rest / step), longest


def from_shared(problem: Problem, gather_bytes: int, copies: int, overhead: float) -> Gather:
    """From all codebooks in shared memory, `copies` of each `gather_bytes` side by side.

    overhead: instructions besides accesses and conversion.
    """
    itemsize, length = layout.books_dtype(problem).itemsize, problem.spec.vector_length
    width = wide(length, itemsize, gather_bytes)
    pieces = length * itemsize // width
    stages = problem.spec.stages
    stride = length * itemsize * copies
    waves = [gather_wavefronts(width, stride, entries, copies) for entries in stages]
    instructions = overhead + pieces + convert(itemsize, length)
    return Gather(pieces, pieces * sum(waves) / len(stages), 0.0, instructions)


def from_global(problem: Problem, room: int, overhead: float) -> Gather:
    """From global memory, through an L1 with `room` bytes for codebooks."""
    itemsize, length = layout.books_dtype(problem).itemsize, problem.spec.vector_length
    entry = length * itemsize
    width = wide(length, itemsize)
    pieces = entry // width
    stages = problem.spec.stages
    books = packed_books(problem)
    sizes = [books * entries // sum(stages) for entries in stages]
    # a small codebook stays beside one that no L1 holds
    misses = [l1_misses(size, room if books > room else size) for size in sizes]
    missed = sum(misses) / len(stages)
    waves = [
        max(gather_wavefronts(width, entry, e), _lines(e * entry) / LINES_A_WAVEFRONT)
        for e in stages
    ]
    return Gather(
        pieces=pieces,
        wavefronts=pieces * sum(waves) / len(stages),
        l2_bytes=LANES * missed * -(-entry // SECTOR) * SECTOR,
        instructions=overhead + pieces + convert(itemsize, length),
        l2_trips=min(1.0, LANES * missed),
        held_bytes=sum(s for s, share in zip(sizes, misses, strict=True) if share == 0),
    )


def _lines(nbytes: int) -> float:
    """Different lines of 128 bytes that 32 random picks among `nbytes` are expected to touch."""
    lines = max(1, nbytes // LINE)
    return lines * (1 - (1 - 1 / lines) ** LANES)
