from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given

from tests.strategies import fitting_specs
from vqkernels.errors import UnsupportedError
from vqkernels.parts import BitCount, check_fit, check_shape, effective_bits, part_table
from vqkernels.presets import PRESETS
from vqkernels.spec import CodebookSpec

LLAMA_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
OPT_BLOCK = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]


@pytest.mark.parametrize(
    ("preset", "layers", "expected", "bits"),
    [
        ("toy-16-4", [(16, 16)], BitCount(192, 2560, 0, 256), 10.75),
        (
            "vptq-65536-256",
            LLAMA_BLOCK,
            BitCount(607125504, 58949632, 0, 202375168),
            3.291288860103627,
        ),
        ("vptq-65536-256", OPT_BLOCK, BitCount(21233664, 50528256, 0, 7077888), 10.138889),
    ],
    ids=["toy", "llama2-7b", "opt-125m"],
)
def test_published_bits(
    preset: str, layers: list[tuple[int, int]], expected: BitCount, bits: float
) -> None:
    count = effective_bits((PRESETS[preset], n, k) for n, k in layers)
    assert count == expected
    digits = len(str(bits).partition(".")[2])
    assert round(count.per_weight(), digits) == bits
    assert count.per_weight(side=False) == count.per_weight()


def test_every_side_is_counted() -> None:
    spec = CodebookSpec(
        vector_length=4,
        stages=(16, 4),
        vector_axis="out",
        codebook_dtype="int8",
        code_bits=(5, 2),
        scale_axis="column",
        zero_axis="row",
        permuted=True,
        rotation_size=8,
        outlier_columns=2,
        outlier_entries=5,
        outlier_vector_length=3,
        uniform_columns=3,
        uniform_bits=6,
    )
    n, k = 10, 21  # 16 main columns, 3 rows of codes
    count = effective_bits([(spec, n, k)])
    assert count.index == 3 * 16 * 7 + 4 * 2 * 3 + 10 * 3 * 6
    assert count.codebook == (16 + 4) * 4 * 8 + 2 * 32 + 5 * 3 * 16
    assert count.side == 16 * (2 * 3 + 8 * 8 + 21 + 21 + 10)
    assert count.weights == 210
    assert count.per_weight() == (count.index + count.codebook + count.side) / 210
    assert count.per_weight(side=False) == (count.index + count.codebook) / 210


def test_dense_outliers_are_side_bits_and_a_bias_costs_nothing() -> None:
    spec = CodebookSpec(vector_length=4, stages=(16,), outlier_columns=2, side_dtype="float32")
    assert effective_bits([(spec, 6, 10)]).side == 6 * 2 * 32
    table = part_table(spec, 6, 10, bias=True)
    assert table["bias"].shape == (6,)
    assert table["bias"].bits == 0


def test_wide_vectors_are_counted_once_for_all_their_rows() -> None:
    spec = CodebookSpec(vector_length=4, vector_width=3, stages=(16, 4))
    count = effective_bits([(spec, 10, 18)])  # 4 x 5 cells, the last of each padded
    assert (count.index, count.codebook) == (4 * 5 * (4 + 2), (16 + 4) * 3 * 4 * 16)
    table = part_table(spec, 10, 18)
    assert (table["codes"].shape, table["codebook_1"].shape) == ((4, 5, 2), (1, 1, 4, 12))


@pytest.mark.parametrize("axis", ["row", "column", "tensor"])
def test_grouped_codebooks_are_counted_for_each_group(axis: str) -> None:
    fields: dict[str, Any] = {"group_axis": axis, "group_size": 0 if axis == "tensor" else 8}
    spec = CodebookSpec(vector_length=4, stages=(2,), subspaces=2, **fields)
    sets = {"row": math.ceil(20 / 8), "column": math.ceil(36 / 8), "tensor": 1}[axis]
    assert effective_bits([(spec, 20, 36)]).codebook == sets * 2 * 2 * 4 * 16


def test_codes_take_a_byte_up_to_256_entries() -> None:
    for stages, dtype in (((256, 3), torch.uint8), ((3, 257), torch.uint16)):
        codes = part_table(CodebookSpec(vector_length=1, stages=stages), 32, 32)["codes"]
        assert codes.dtype == dtype
        assert codes.limit == max(stages)


@given(fitting_specs())
def test_parts_and_bits_agree(drawn: tuple[CodebookSpec, int, int]) -> None:
    spec, n, k = drawn
    check_fit(spec, n, k)
    table = part_table(spec, n, k)
    count = effective_bits([(spec, n, k)])
    assert count.index + count.codebook + count.side == sum(part.bits for part in table.values())
    for part in table.values():
        if part.role != "index":
            assert part.bits == part.numel * part.dtype.itemsize * 8
    assert effective_bits([(spec, n, k)] * 3) == count + count + count


@pytest.mark.parametrize(
    ("fields", "n", "k", "says"),
    [
        ({}, 0, 8, "no weights"),
        ({}, 8, 0, "no weights"),
        ({"outlier_columns": 5, "uniform_columns": 3}, 8, 8, "leave nothing of 8"),
        ({"rotation_size": 3}, 8, 8, "3 doesn't divide 8"),
        ({"rotation_size": 4, "outlier_columns": 1}, 8, 8, "4 doesn't divide 7"),
    ],
)
def test_a_shape_that_cannot_be_cut(fields: dict[str, Any], n: int, k: int, says: str) -> None:
    spec = CodebookSpec(vector_length=4, stages=(2,), **fields)
    for check in (check_shape, check_fit):
        with pytest.raises(UnsupportedError, match=says):
            check(spec, n, k)


@pytest.mark.parametrize(
    ("fields", "fitting", "too_small"),
    [
        ({}, (16, 4), (15, 4)),
        ({"subspaces": 2}, (16, 8), (15, 8)),
        ({"group_axis": "row", "group_size": 8}, (16, 8), (16, 4)),
        ({"vector_axis": "out"}, (4, 16), (4, 15)),
        ({"vector_width": 3}, (46, 4), (45, 4)),
    ],
)
def test_more_entries_than_vectors_is_refused(
    fields: dict[str, Any], fitting: tuple[int, int], too_small: tuple[int, int]
) -> None:
    spec = CodebookSpec(vector_length=4, stages=(2, 16), **fields)
    check_fit(spec, *fitting)
    with pytest.raises(UnsupportedError, match=r"16 entries for .* vectors"):
        check_fit(spec, *too_small)
    check_shape(spec, *too_small)


def test_the_refusal_of_a_large_preset_names_the_numbers() -> None:
    with pytest.raises(UnsupportedError, match="65,536 entries for 18,432 vectors"):
        check_fit(PRESETS["vptq-65536-256"], 384, 384)
