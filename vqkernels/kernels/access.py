"""What a warp's access to memory costs: wavefronts of L1 and shared memory, misses to the L2.

The hardware serves 128 bytes a wavefront from 32 banks of 4 bytes: a 4-byte access of all lanes at
once, an 8-byte one by halves of the warp, a 16-byte one by quarters; lanes that meet in a bank with
different words take turns. Of global memory a wavefront takes 4 lines of 128 bytes at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

__all__ = [
    "LANES",
    "SECTOR",
    "gather_wavefronts",
    "l1_misses",
    "strided_wavefronts",
]

LANES = 32
SECTOR, LINE = 32, 128
LINES_A_WAVEFRONT = 4


@functools.cache
def strided_wavefronts(stride: int, width: int) -> int:
    """Wavefronts of a warp's access of `width` bytes a lane, `stride` bytes apart."""
    total = 0
    served = LANES * 4 // max(4, width)
    for first in range(0, LANES, served):
        words = {
            (lane * stride + byte) // 4
            for lane in range(first, first + served)
            for byte in range(0, max(4, width), 4)
        }
        banks = [0] * LANES
        for word in words:
            banks[word % LANES] += 1
        total += max(banks)
    lines = len({lane * stride // LINE for lane in range(LANES)})
    return max(total, math.ceil(lines / LINES_A_WAVEFRONT))


@functools.cache
def gather_wavefronts(width: int, stride: int, entries: int, copies: int = 1) -> float:
    """Expected wavefronts of a warp's gather of `width` bytes a lane from random entries.

    stride: bytes from an entry to the next, of all its copies side by side. copies: lane l reads
    copy `l % copies`, so lanes of different copies never meet. Lanes that read the same entry share
    one word. A quarter of a warp that gathers 16-byte entries takes 2.54 wavefronts of 256 entries
    in one copy, 2.37, 1.94 and 1 in 2, 4 and 8.
    """
    served = LANES * 4 // max(4, width)
    # entries begin at so many places among the banks; two in one place never go together
    places = LINE // math.gcd(stride, LINE)
    lanes = max(1, served // copies)
    classes = served // lanes
    expected = 0.0
    for most in range(lanes):
        expected += 1 - _none_above(lanes, places, most, max(1, entries // places)) ** classes
    return expected * (LANES // served)


def _none_above(lanes: int, places: int, most: int, entries: int) -> float:
    """The chance that of `lanes` random lanes no place has over `most` different entries asked.

    entries: of each place.
    """
    if most == 0:
        return 0.0
    # exponential generating function of one place: z^j/j! for each way j lanes choose `most` or
    # fewer of its entries, over all ways
    place = [
        sum(_distinct(j, d, entries) for d in range(min(j, most) + 1)) / math.factorial(j)
        for j in range(lanes + 1)
    ]
    whole = _power(place, places)
    return whole[lanes] * float(math.factorial(lanes)) / float(places) ** lanes


def _power(one: Sequence[float], exponent: int) -> Sequence[float]:
    if exponent == 1:
        return one
    half = _power(one, exponent // 2)
    square = _product(half, half)
    return _product(square, one) if exponent % 2 else square


def _product(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [sum(one[i] * other[n - i] for i in range(n + 1)) for n in range(len(one))]


@functools.cache
def _distinct(draws: int, kinds: int, entries: int) -> float:
    """The chance that `draws` random picks among `entries` are of exactly `kinds` of them."""
    if draws == 0:
        return float(kinds == 0)
    if kinds == 0 or kinds > entries:
        return 0.0
    again = _distinct(draws - 1, kinds, entries) * kinds / entries
    return again + _distinct(draws - 1, kinds - 1, entries) * (entries - kinds + 1) / entries


def l1_misses(nbytes: int, room: int) -> float:
    """The share of random gathers from `nbytes` that an L1 of `room` bytes doesn't hold.

    What is larger than the L1 is there by lines of which a gather brings one sector of four.
    """
    if nbytes <= room:
        return 0.0
    return 1 - max(0, room) / 4 / nbytes
