from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkernels.errors import TensorError
from vqkernels.packing import pack_codes, packed_words, unpack_codes

Rows = list[list[tuple[int, ...]]]


@st.composite
def grids(draw: st.DrawFn) -> tuple[Rows, list[int]]:
    bits = draw(st.lists(st.integers(1, 16), min_size=1, max_size=4))
    columns = draw(st.integers(1, 40))
    cell = st.tuples(*(st.integers(0, (1 << width) - 1) for width in bits))
    row = st.lists(cell, min_size=columns, max_size=columns)
    return draw(st.lists(row, min_size=1, max_size=3)), bits


def as_tensor(rows: Rows, bits: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8 if max(bits) <= 8 else torch.uint16)


def big_integer_bytes(row: list[tuple[int, ...]], bits: list[int]) -> bytes:
    """The bitstream as one Python integer: each code is put above those before it."""
    stream = position = 0
    for cell in row:
        for code, width in zip(cell, bits, strict=True):
            stream += code * 2**position
            position += width
    return stream.to_bytes(-(-position // 32) * 4, "little")


@given(grids())
def test_packing_is_one_long_integer_a_row(drawn: tuple[Rows, list[int]]) -> None:
    rows, bits = drawn
    words = pack_codes(as_tensor(rows, bits), bits)
    assert words.dtype == torch.int32
    assert words.shape == (len(rows), packed_words(len(rows[0]), bits))
    for row, packed in zip(rows, words.numpy(), strict=True):
        assert packed.astype("<i4").tobytes() == big_integer_bytes(row, bits)


@given(grids())
def test_unpacking_is_the_inverse(drawn: tuple[Rows, list[int]]) -> None:
    rows, bits = drawn
    codes = as_tensor(rows, bits)
    unpacked = unpack_codes(pack_codes(codes, bits), len(rows[0]), bits)
    assert unpacked.dtype == codes.dtype
    assert unpacked.tolist() == [[list(cell) for cell in row] for row in rows]


def test_the_first_stage_is_in_the_low_bits_and_codes_straddle_words() -> None:
    # VPTQ's layout by hand: three cells of 12 + 8 bits, 60 bits in two words
    codes = torch.tensor([[[0xABC, 0x12], [0x345, 0x67], [0xDEF, 0x89]]], dtype=torch.uint16)
    words = pack_codes(codes, (12, 8))
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x34512ABC, 0x089DEF67]


def test_a_code_wider_than_its_stage_is_refused() -> None:
    codes = torch.tensor([[[3, 4]]], dtype=torch.uint8)
    with pytest.raises(TensorError, match="stage 1 holds 4, too large for 2 bits"):
        pack_codes(codes, (2, 2))


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int32),
    ],
    ids=["too long", "too short", "another dtype", "flat"],
)
def test_words_of_another_shape_are_refused(words: torch.Tensor) -> None:
    with pytest.raises(TensorError, match=r"5 cells of 8 bits need int32 \[rows, 2\]"):
        unpack_codes(words, 5, (5, 3))
