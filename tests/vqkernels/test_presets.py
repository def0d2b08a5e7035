from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from vqkernels.errors import SpecError
from vqkernels.presets import PRESETS, parse_format

EXPECTED: dict[str, dict[str, Any]] = {
    "vq-256x8": {"stages": (256,), "vector_length": 8},
    "vq-256x16": {"stages": (256,), "vector_length": 16},
    "vq-256x32": {"stages": (256,), "vector_length": 32},
    "vq-256x8-channel": {"stages": (256,), "vector_length": 8, "group_axis": "row"},
    "pq-m4": {"stages": (256,), "vector_length": 32, "subspaces": 4},
    "pq-m8": {"stages": (256,), "vector_length": 16, "subspaces": 8},
    "pq-m16": {"stages": (256,), "vector_length": 8, "subspaces": 16},
    "opq-m8": {"vector_length": 16, "subspaces": 8, "rotation_size": 128, "method": "opq"},
    "rq-2x256x8": {"stages": (256,) * 2, "vector_length": 8, "method": "rq"},
    "rq-3x256x8": {"stages": (256,) * 3, "vector_length": 8, "method": "rq"},
    "rq-4x256x8": {"stages": (256,) * 4, "vector_length": 8, "method": "rq"},
    "aqlm-1x16": {"stages": (65536,), "vector_length": 8, "scale_axis": "row"},
    "aqlm-2x8": {"stages": (256, 256), "vector_length": 8, "scale_axis": "row"},
    "vptq-65536-256": {"stages": (65536, 256), "vector_length": 8, "vector_axis": "out"},
    "toy-16-4": {"stages": (16, 4), "vector_length": 8, "vector_axis": "out"},
}


def test_no_preset_is_missing_or_unknown() -> None:
    assert set(PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_means_what_it_says(name: str) -> None:
    spec = parse_format(name)
    assert spec == PRESETS[name]
    assert {field: getattr(spec, field) for field in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize(
    "name", ["vq-256x8", "pq-m8", "rq-3x256x8", "aqlm-1x16", "aqlm-2x8", "vptq-65536-256"]
)
def test_the_grammar_makes_the_presets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = PRESETS[name]
    monkeypatch.setattr("vqkernels.presets.PRESETS", {})
    assert parse_format(name) == expected


def test_sized_names() -> None:
    assert parse_format("vq-512x4").stages == (512,)
    assert parse_format("rq-3x128x16").stages == (128, 128, 128)
    assert parse_format("aqlm-3x4").stages == (16, 16, 16)
    wide = parse_format("aqlm-2x8-g2x16")
    assert (wide.stages, wide.vector_width, wide.vector_length) == ((256, 256), 2, 16)
    assert parse_format("vptq-4096-0").stages == (4096,)
    assert parse_format("pq-m32").vector_length == 4


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vq",
        "vq-256",
        "vq-0x8",
        "vq-256x0",
        "vq-99999x8",
        "vq-256x8 ",
        "pq-m0",
        "pq-m3",
        "pq-m256",
        "rq-0x256x8",
        "rq-9999999999x256x8",
        "aqlm-2x17",
        "aqlm-1x9999999999",
        "aqlm-0x8",
        "aqlm-2x8-g0x8",
        "aqlm-2x8-g8",
        "vptq-0-256",
        "nowhere.toml",
    ],
)
def test_a_name_that_means_nothing_is_a_spec_error(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_format(name)
    assert "\n" not in str(caught.value)


def test_fields_follow_a_name() -> None:
    spec = parse_format(
        "rq-2x256x8,scale_axis=row,rotation_size=128,outlier_columns=16,permuted=true"
    )
    assert spec == dataclasses.replace(
        PRESETS["rq-2x256x8"],
        scale_axis="row",
        rotation_size=128,
        outlier_columns=16,
        permuted=True,
    )
    assert parse_format("vq-512x4,permuted=false").stages == (512,)
    listed = parse_format("toy-16-4,stages=32+4,coefficients=1+0.25")
    assert (listed.stages, listed.coefficients, listed.code_bits) == ((32, 4), (1, 0.25), (5, 2))
    assert parse_format("vq-256x8,code_bits=9").code_bits == (9,)
    assert parse_format("vq-256x8,vector_axis=out,stride=2").stride == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("", "'' sets no field"),
        ("stride", "'stride' sets no field"),
        ("stride=", "'stride=' sets no field"),
        ("colour=1", "unknown field 'colour'; known: vector_length"),
        (" stride=2", "unknown field ' stride'"),
        ("stride=2,stride=2", "stride is set twice"),
        ("stride=two", "stride must be a whole number"),
        ("stride=1.5", "stride must be a whole number"),
        ("stride=1_0", "stride must be a whole number"),
        ("stride=\u0663", "stride must be a whole number"),
        ("stride=" + "9" * 5000, "stride must be a whole number"),
        ("permuted=yes", "permuted must be true or false"),
        ("scale_axis=../row", "scale_axis '../row' is not one of none, tensor"),
        ("stages=16+", "stages must be a list of numbers"),
        ("coefficients=nan", "coefficients must be a list of numbers"),
        ("code_bits=3", "3-bit codes for 256 entries"),
        ("group_size=8", "group_size goes with group_axis"),
    ],
)
def test_a_field_that_means_nothing_is_a_spec_error(settings: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        parse_format("vq-256x8," + settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("format 'vq-256x8,")


def test_fields_of_a_file_are_set_in_the_file() -> None:
    with pytest.raises(SpecError, match=r"'mine.toml,stride=2': fields of a .toml file are set"):
        parse_format("mine.toml,stride=2")


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(SpecError, match=r"'vq-tiny' is unknown.*toy-16-4"):
        parse_format("vq-tiny")


def test_a_toml_file_is_a_format(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('stages = [512, 4]\nvector_length = 6\nvector_axis = "out"\n')
    spec = parse_format(str(path))
    assert (spec.stages, spec.vector_length, spec.vector_axis) == ((512, 4), 6, "out")


@pytest.mark.parametrize(
    "text",
    ["stages = [", "stages = [16]", "stages = 16\nvector_length = 2", "colour = 1", "\udcff"],
    ids=["no TOML", "field missing", "wrong type", "unknown field", "no UTF-8"],
)
def test_a_bad_toml_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpecError, match=r"mine\.toml"):
        parse_format(str(path))
