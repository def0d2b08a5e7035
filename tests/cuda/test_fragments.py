"""mma and ldmatrix take and give the fragments that the PTX ISA lays out.

The tables of its section "Matrix fragments" are one function each here: the row and the column of
element i of a lane, in the words of the tables.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.samples import Sample, Samples, build_samples

# Loads 8 (a, b) and 4 (d) registers of a lane, and stores the sums.
MMA = """
const auto words = global(static_cast<const u32*>(a.in));
u32 a_[4], b_[2];
for (int r = 0; r < 4; r++) a_[r] = words.load(r * 32 + t);
for (int r = 0; r < 2; r++) b_[r] = words.load((4 + r) * 32 + t);
%s d[%d];
for (int r = 0; r < %d; r++) d[r] = in.load((6 + r) * 32 + t);
%s(d, a_, b_);
for (int r = 0; r < %d; r++) out.store(r * 32 + t, d[r]);
"""
MATRICES = """
const auto s = shared_memory().as<u16>();
for (int i = t; i < 256; i += 32) s.store(i, in.load(i));
sync_block();
u32 d[4];
%s(d, s, t * 8);
for (int r = 0; r < 4; r++) out.store(r * 32 + t, d[r]);
"""
SAMPLES = {
    "mma_half": Sample(MMA % ("float", 4, 4, "mma_m16n8k16<__half>", 4)),
    "mma_bfloat16": Sample(MMA % ("float", 4, 4, "mma_m16n8k16<__nv_bfloat16>", 4)),
    "mma_half_sums": Sample(MMA % ("u32", 2, 2, "mma_m16n8k16", 2), "u32", "u32"),
    "mma_bytes": Sample(MMA % ("int", 4, 4, "mma_m16n8k32", 4), "int", "int"),
    "mma_wrong": Sample(
        (MMA % ("float", 4, 4, "mma_m16n8k16<__half>", 4)).replace(
            "r * 32", "(r ^ (r > 0) * 3) * 32", 1
        )
    ),
    "matrices": Sample(MATRICES % "load_matrices", "u16", "u32"),
    "matrices_transposed": Sample(MATRICES % "load_matrices_transposed", "u16", "u32"),
}


@pytest.fixture(scope="module")
def kernels() -> Samples:
    return build_samples(SAMPLES)


Place = Callable[[int, int], tuple[int, int]]


def place_in_a(lane: int, i: int) -> tuple[int, int]:
    """m16n8k16, 16-bit: rows groupID for i < 2 or 4 <= i < 6, groupID + 8 otherwise."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def place_in_byte_a(lane: int, i: int) -> tuple[int, int]:
    """m16n8k32, 8-bit: rows groupID for 0 <= i < 4 or 8 <= i < 12; columns + 16 from i = 8."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def place_in_byte_b(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def registers(matrix: np.ndarray, place: Place, count: int) -> np.ndarray:
    """`[registers, 32]` 32-bit words that hold the fragments of `count` elements a lane."""
    elements = np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)])
    return np.ascontiguousarray(elements.view(np.uint32).T)


def words(*parts: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).view(np.int32).copy()).view(dtype).flatten()


def bfloat16_bits(matrix: np.ndarray) -> np.ndarray:
    return torch.from_numpy(matrix).bfloat16().view(torch.int16).numpy()


def mma_case(name: str) -> tuple[Tensor, np.ndarray]:
    """The words of a, b and c, and a @ b + c as fragments."""
    random = np.random.default_rng(5)
    if name == "mma_bytes":
        a = random.integers(-128, 128, (16, 32), dtype=np.int8)
        b = random.integers(-128, 128, (32, 8), dtype=np.int8)
        c = random.integers(-1000, 1000, (16, 8), dtype=np.int32)
        parts = registers(a, place_in_byte_a, 16), registers(b, place_in_byte_b, 8)
        d = a.astype(np.int32) @ b.astype(np.int32) + c
        return words(*parts, registers(c, place_in_c, 4), dtype=torch.int32), d
    # eighths: sums are exact in half too
    a = random.integers(-16, 17, (16, 16)).astype(np.float32) / 8
    b = random.integers(-4, 5, (16, 8)).astype(np.float32)
    c = random.integers(-16, 17, (16, 8)).astype(np.float32)
    bits = bfloat16_bits if name == "mma_bfloat16" else lambda matrix: matrix.astype(np.float16)
    parts = registers(bits(a), place_in_a, 8), registers(bits(b), place_in_b, 4)
    if name == "mma_half_sums":
        sums = registers(c.astype(np.float16), place_in_c, 4)
        return words(*parts, sums, dtype=torch.int32), a @ b + c
    return words(*parts, registers(c, place_in_c, 4), dtype=torch.float32), a @ b + c


def matrix_of(out: Tensor, name: str) -> np.ndarray:
    if name == "mma_half_sums":
        elements = np.ascontiguousarray(out.numpy().reshape(2, 32).T).view(np.float16)
    else:
        elements = out.numpy().reshape(4, 32).T
    matrix = np.zeros((16, 8), dtype=np.float64)
    for lane in range(32):
        for i in range(4):
            matrix[place_in_c(lane, i)] = elements[lane, i]
    return matrix


@pytest.mark.parametrize("name", ["mma_half", "mma_bfloat16", "mma_half_sums", "mma_bytes"])
def test_mma(kernels: Samples, name: str) -> None:
    given, d = mma_case(name)
    out = torch.empty(64 if name == "mma_half_sums" else 128, dtype=given.dtype)
    kernels.run(name, given, out).check()
    np.testing.assert_array_equal(matrix_of(out, name), d)


def test_a_wrong_fragment_element_shows(kernels: Samples) -> None:
    given, d = mma_case("mma_half")
    out = torch.empty(128)
    kernels.run("mma_wrong", given, out).check()
    assert (matrix_of(out, "mma_half") != d).any()


@pytest.mark.parametrize("name", ["matrices", "matrices_transposed"])
def test_matrices(kernels: Samples, name: str) -> None:
    given = torch.arange(256, dtype=torch.int16)
    out = torch.empty(128, dtype=torch.int32)
    kernels.run(name, given, out, shared_bytes=512).check()
    four = given.numpy().reshape(4, 8, 8)
    if name == "matrices_transposed":
        four = four.transpose(0, 2, 1)
    # register m of lane l: row l / 4 of matrix m, elements 2 (l % 4) and the next
    expected = four.reshape(4, 32, 2)
    np.testing.assert_array_equal(out.numpy().view(np.int16).reshape(4, 32, 2), expected)
