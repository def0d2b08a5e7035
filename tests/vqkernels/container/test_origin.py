"""Where a container comes from, and how its matrices were made."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vqkernels.container.crafted import description_of, rebuild, refused
from vqkernels import container
from vqkernels.container.origin import library_stamp
from vqkernels.errors import ContainerError
from vqkernels.presets import PRESETS
from vqkernels.tensor import random_tensor

TENSORS = {name: random_tensor(PRESETS["toy-16-4"], 16, 16) for name in "ab"}
MADE = {
    "method": "rq",
    "seed": 2**63 - 1,
    "iterations": 25,
    "error": 0.125,
    "clip": [-3, 2.5],
    "clip_percentiles": (0.1, 99.9),
    "calibration": "none",
    "anything else": [1, 2.5, 3],
    "note": "ä\n",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def test_made_comes_back_for_its_matrix(path: Path) -> None:
    container.save(path, TENSORS, made={"b": MADE})
    a, b = container.describe(path).tensors
    assert a.made == {}
    assert "made" not in description_of(path)["tensors"][0]
    assert b.made == {**MADE, "clip": (-3, 2.5), "anything else": (1, 2.5, 3)}
    with pytest.raises(TypeError):
        b.made["seed"] = 1  # type: ignore[index]  # it is of what is in the file


WRONG: dict[str, tuple[Any, str]] = {
    "no object": (["seed"], "is no object"),
    "no name": ({"": 1}, "'' is no name"),
    "a long name": ({"x" * 65: 1}, "is no name of 1 to 64"),
    "a name of two lines": ({"a\nb": 1}, r"'a\\nb' is no name"),
    "a number for a name": ({1: 1}, "1 is no name"),
    "nothing": ({"x": None}, "x is no string, finite number or list"),
    "a truth": ({"x": True}, "x is no string"),
    "an object": ({"x": {}}, "x is no string"),
    "infinity": ({"x": float("inf")}, "x is no string, finite"),
    "not a number": ({"x": [float("nan")]}, "x is no string, finite"),
    "a huge number": ({"x": 2**63}, "x is no string"),
    "a list of words": ({"x": ["a"]}, "x is no string"),
    "a long list": ({"x": [0] * 17}, "x is no string, finite number or list of up to 16"),
    "a long text": ({"x": "x" * 4097}, "x is no string"),
    "many names": ({str(number): 0 for number in range(33)}, "has 33 names, over 32"),
    "seed of text": ({"seed": "7"}, "seed is '7', not a whole number"),
    "half an iteration": ({"iterations": 0.5}, "iterations is 0.5, not a whole number"),
    "error below 0": ({"error": -1}, "error is -1, not a number from 0 up"),
    "error of text": ({"error": "small"}, "error is 'small', not a number"),
    "clip of one": ({"clip": [1]}, r"clip is \[1\], not \[low, high\]"),
    "clip reversed": ({"clip": [1, -1]}, r"clip is \[1, -1\], not"),
    "clip a number": ({"clip": 1}, "clip is 1, not"),
    "percentile of 101": ({"clip_percentiles": [0, 101]}, r"\[0, 101\], not .* of 0 to 100"),
    "calibration a number": ({"calibration": 1}, "calibration is 1, not a string"),
    "method a list": ({"method": [1]}, r"method is \[1\], not a string"),
}


@pytest.mark.parametrize(("made", "says"), WRONG.values(), ids=WRONG)
def test_made_of_the_wrong_kind(made: Any, says: str, path: Path) -> None:
    with pytest.raises(ContainerError, match=f"tensor 'b': made.*{says}") as caught:
        container.save(path, TENSORS, made={"b": made})
    assert str(caught.value).startswith(f"{path}: ")
    assert not path.exists()
    if made and all(isinstance(name, str) for name in made):
        container.save(path, TENSORS)
        rebuild(path, lambda content, _: content["tensors"][1].update(made=made))
        refused(path, ContainerError, f"({says}|not JSON).*it was damaged")


def test_made_of_a_matrix_that_is_not_there(path: Path) -> None:
    with pytest.raises(ContainerError, match="made is of 'c', which is no tensor; check the name"):
        container.save(path, TENSORS, made={"a": MADE, "c": MADE})
    assert not path.exists()


@pytest.mark.parametrize("created", ["2026-11-22", datetime(2026, 1, 2, tzinfo=UTC).isoformat()])
def test_a_date(created: str, path: Path) -> None:
    container.save(path, TENSORS, provenance={"created": created, "author": "somebody"})
    assert container.describe(path).provenance["created"] == created


@pytest.mark.parametrize("created", ["", "yesterday", "22.11.2026"])
def test_no_date(created: str, path: Path) -> None:
    with pytest.raises(ContainerError, match=r"created is .*, no ISO 8601 date; use"):
        container.save(path, TENSORS, provenance={"created": created})
    assert not path.exists()


def test_fields_that_nobody_knows_are_passed_over(path: Path) -> None:
    container.save(path, TENSORS)
    more = {"number": 1, "of": [2, "x"]}

    def add(content: dict[str, Any], _: object) -> None:
        content["more"] = more
        content["tensors"][0]["colour"] = "red"

    rebuild(path, add)
    assert container.open_container(path).info.extra == {"more": more}
    container.load(path, decoded=True)


def test_the_library_stamp_names_versions() -> None:
    stamp = library_stamp()
    assert f"torch {torch.__version__.partition('+')[0]}" in stamp
    assert "numpy " in stamp
    assert "safetensors " in stamp
