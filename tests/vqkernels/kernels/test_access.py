"""Wavefronts of a warp's accesses, by hand, by drawing, and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkernels.kernels.access import gather_wavefronts, l1_misses, strided_wavefronts


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts"),
    [
        (1, 1, 1),  # 32 bytes side by side
        (4, 4, 1),
        (8, 8, 2),
        (16, 16, 4),
        (32, 16, 8),  # every other 16 bytes: a quarter of the warp meets twice
        (64, 16, 16),
        (128, 4, 32),  # all in one bank
        (132, 4, 8),  # a bank each, but 32 lines: four at a time
        (0, 4, 1),  # the same word
    ],
)
def test_lanes_that_lie_apart(stride: int, width: int, wavefronts: int) -> None:
    assert strided_wavefronts(stride, width) == wavefronts


@pytest.mark.parametrize(
    ("copies", "expected"), [(1, 2.54), (2, 2.37), (4, 1.94), (8, 1.0)], ids=str
)
def test_copies_of_16_byte_entries(copies: int, expected: float) -> None:
    """A quarter of a warp, of 256 entries."""
    assert gather_wavefronts(16, 16 * copies, 256, copies) / 4 == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    ("width", "stride", "entries", "copies"),
    [(16, 16, 256, 1), (16, 32, 256, 1), (8, 64, 256, 4), (4, 16, 16, 1), (8, 24, 100, 1)],
)
def test_gathers_as_drawn(width: int, stride: int, entries: int, copies: int) -> None:
    """Banks counted for codes at random: lanes served together, words that differ in a bank."""
    rng, served = np.random.default_rng(0), 128 // width
    waves = []
    for _ in range(4000):
        codes = rng.integers(0, entries, served)
        first = codes * stride + np.arange(served) % copies * width
        words = {int(at) // 4 + word for at in first for word in range(width // 4)}
        waves.append(max(np.bincount([word % 32 for word in words])))
    expected = np.mean(waves) * 32 / served
    assert gather_wavefronts(width, stride, entries, copies) == pytest.approx(expected, rel=0.03)


widths = st.sampled_from([4, 8, 16])


@given(widths, st.integers(1, 4), st.sampled_from([16, 256, 65536]))
def test_conflicts_are_none_to_all(width: int, pieces: int, entries: int) -> None:
    waves = gather_wavefronts(width, width * pieces, entries)
    assert width / 4 <= waves <= 32
    # with fewer entries, more lanes share a word
    assert waves <= gather_wavefronts(width, width * pieces, 4 * entries) + 1e-9


@given(widths)
def test_more_copies_never_conflict_more(width: int) -> None:
    """Of many entries: of few, lanes in one bank often share a word."""
    copies = [c for c in (1, 2, 4, 8, 16, 32) if c * width <= 128]
    waves = [gather_wavefronts(width, width * c, 65536, c) for c in copies]
    assert waves == sorted(waves, reverse=True)
    assert waves[-1] == pytest.approx(width / 4)


@given(st.integers(1, 1 << 24), st.integers(0, 1 << 18))
def test_misses_are_a_share(nbytes: int, room: int) -> None:
    misses = l1_misses(nbytes, room)
    assert 0 <= misses <= 1
    assert (misses == 0) == (nbytes <= room)
    assert l1_misses(2 * nbytes, room) >= misses


def test_a_megabyte_beside_an_l1_of_a_quarter() -> None:
    """0.94 of the gathers go to the L2: a line holds one sector of use of four."""
    assert l1_misses(1 << 20, 1 << 18) == pytest.approx(0.9375)
