from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from tests.strategies import fitting_specs
from vqkernels.errors import SpecError
from vqkernels.spec import CodebookSpec, min_bits

PLAIN: dict[str, Any] = {"vector_length": 4, "stages": (16,)}

BAD_FIELDS = {
    "vector_length zero": ({"vector_length": 0}, "vector_length"),
    "vector_length negative": ({"vector_length": -1}, "vector_length"),
    "vector_length a float": ({"vector_length": 4.0}, "vector_length"),
    "vector_length a bool": ({"vector_length": True}, "vector_length"),
    "vector_width zero": ({"vector_width": 0}, "vector_width 0"),
    "vector_width along out": (
        {"vector_width": 2, "vector_axis": "out"},
        "vector_width 2 along out.*vector_length counts them",
    ),
    "groups cut wide vectors": (
        {"vector_width": 4, "group_axis": "row", "group_size": 6},
        "multiple of 4",
    ),
    "stride zero": ({"stride": 0}, "stride"),
    "subspaces zero": ({"subspaces": 0}, "subspaces"),
    "stages empty": ({"stages": ()}, "stages is empty"),
    "stages a number": ({"stages": 16}, "stages must be a list"),
    "stages text": ({"stages": "16"}, "stages must be a list"),
    "a stage of floats": ({"stages": (16.0,)}, "stages must be a list"),
    "a stage of bools": ({"stages": (True,)}, "stages must be a list"),
    "a stage of 0": ({"stages": (16, 0)}, "a stage of 0"),
    "a stage too large": ({"stages": (65537,)}, "65537"),
    "code_bits a number": ({"code_bits": 4}, "code_bits must be a list"),
    "code_bits too few": ({"stages": (16, 16), "code_bits": (4,)}, "one number for each stage"),
    "code_bits too narrow": ({"code_bits": (3,)}, "3-bit codes for 16 entries"),
    "code_bits too wide": ({"code_bits": (17,)}, "17-bit codes"),
    "coefficients a number": ({"coefficients": 1.0}, "coefficients must be a list"),
    "coefficients text": ({"coefficients": ("1",)}, "coefficients must be a list"),
    "coefficients too many": ({"coefficients": (1.0, 1.0)}, "one number for each stage"),
    "coefficients NaN": ({"coefficients": (float("nan"),)}, "finite"),
    "coefficients infinite": ({"coefficients": (float("inf"),)}, "finite"),
    "vector_axis": ({"vector_axis": "inside"}, "vector_axis 'inside'"),
    "method": ({"method": "jpeg"}, "method 'jpeg'"),
    "distance": ({"distance": "l1"}, "distance 'l1'"),
    "traversal": ({"traversal": "zigzag"}, "traversal 'zigzag'"),
    "codebook_dtype": ({"codebook_dtype": "float64"}, "codebook_dtype 'float64'"),
    "side_dtype": ({"side_dtype": "int8"}, "side_dtype 'int8'"),
    "scale_axis": ({"scale_axis": "diagonal"}, "scale_axis 'diagonal'"),
    "zero_axis": ({"zero_axis": ["row"]}, "zero_axis"),
    "permuted": ({"permuted": 1}, "permuted must be true or false"),
    "group_size without an axis": ({"group_size": 4}, "group_size goes with group_axis"),
    "group_axis without a size": ({"group_axis": "row"}, "group_size goes with group_axis"),
    "groups cut vectors along in": ({"group_axis": "column", "group_size": 6}, "multiple of 4"),
    "groups cut vectors along out": (
        {"vector_axis": "out", "group_axis": "row", "group_size": 6},
        "multiple of 4",
    ),
    "groups cut strided vectors": (
        {"group_axis": "column", "group_size": 12, "stride": 2},
        "multiple of 8",
    ),
    "outlier codebook without a length": (
        {"outlier_columns": 1, "outlier_entries": 4},
        "go together",
    ),
    "outlier codebook without columns": (
        {"outlier_entries": 4, "outlier_vector_length": 2},
        "without outlier_columns",
    ),
    "outlier codebook too large": (
        {"outlier_columns": 1, "outlier_entries": 65537, "outlier_vector_length": 2},
        "65537 outlier entries",
    ),
    "uniform_bits zero": ({"uniform_bits": 0}, "uniform_bits 0"),
    "uniform_bits nine": ({"uniform_bits": 9}, "uniform_bits 9"),
}


@pytest.mark.parametrize(("fields", "says"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_contradiction_is_a_spec_error(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        CodebookSpec(**(PLAIN | fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"group_axis": "row", "group_size": 6},  # along out, where vectors along in aren't cut
        {"group_axis": "column", "group_size": 8, "stride": 2},
        {"vector_width": 3, "group_axis": "row", "group_size": 6},
        {"vector_width": 3, "group_axis": "column", "group_size": 8},
        {"vector_axis": "out", "group_axis": "column", "group_size": 3},
        {"stages": (65536, 1), "code_bits": (16, 1)},
        {"coefficients": (2,)},
        {"stages": [16, 4]},
    ],
)
def test_unusual_but_valid_fields(fields: dict[str, Any]) -> None:
    CodebookSpec(**(PLAIN | fields))


def test_defaults_that_follow_from_the_stages() -> None:
    spec = CodebookSpec(vector_length=8, stages=(65536, 256, 3, 1))
    assert spec.code_bits == (16, 8, 2, 1)
    assert spec.vector_bits == 27
    assert spec.max_entries == 65536
    assert [spec.coefficient(stage) for stage in range(4)] == [1.0] * 4


def test_coefficients_and_side_columns() -> None:
    spec = CodebookSpec(
        **PLAIN | {"stages": (4, 4)},
        coefficients=(1.0, 0.5),
        outlier_columns=3,
        uniform_columns=2,
    )
    assert spec.coefficient(1) == 0.5
    assert spec.side_columns == 5


def test_min_bits_is_the_fewest() -> None:
    for entries in range(1, 65537):
        bits = min_bits(entries)
        assert entries <= 1 << bits
        assert bits == 1 or entries > 1 << (bits - 1)


@given(fitting_specs())
def test_fields_survive_json(drawn: tuple[CodebookSpec, int, int]) -> None:
    spec = drawn[0]
    assert CodebookSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_format_of_version_1_keeps_its_text() -> None:
    narrow = CodebookSpec(**PLAIN)
    assert "vector_width" not in narrow.to_dict()
    assert CodebookSpec.from_dict({**narrow.to_dict(), "vector_width": 1}) == narrow
    wide = CodebookSpec(**PLAIN, vector_width=2)
    assert wide.to_dict() == {**narrow.to_dict(), "vector_width": 2}
    assert (wide.vector_size, wide.vector_text) == (8, "2x4")
    assert (narrow.vector_size, narrow.vector_text) == (4, "4")


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"unknown field 'colour'.*vector_length, stages"):
        CodebookSpec.from_dict({**PLAIN, "colour": 1})


@pytest.mark.parametrize("field", ["vector_length", "stages"])
def test_a_missing_field_is_named(field: str) -> None:
    fields = {name: value for name, value in PLAIN.items() if name != field}
    with pytest.raises(SpecError, match=f"{field}.*missing"):
        CodebookSpec.from_dict(fields)
