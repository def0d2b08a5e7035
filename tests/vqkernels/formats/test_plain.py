from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import quantized_tensors
from tests.vqkernels.formats.damage import (
    DESCRIPTION_EDITS,
    NAMES,
    SPEC,
    assert_same,
    assert_tells,
    redescribed,
    small,
)
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.formats import open_source, plain
from vqkernels.formats.plain import PlainSource, save_plain
from vqkernels.presets import PRESETS
from vqkernels.tensor import QuantizedTensor, random_tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    save_plain(folder, {"layer": small()}, provenance={"note": "ä"}, made={"layer": {"seed": 1}})
    return folder


def index_of(folder: Path) -> Any:
    return json.loads((folder / "layers.json").read_text())


# ------------------------------------------------------------------------------------------------
# round trips


@settings(max_examples=25)
@given(st.lists(quantized_tensors(max_side=12), min_size=1, max_size=2))
def test_any_format_survives(tensors: list[QuantizedTensor]) -> None:
    saved = {f"layer.{number}": tensor for number, tensor in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "set")
        save_plain(folder, saved)
        found = PlainSource(folder)
        assert list(found) == list(saved)
        for name, tensor in saved.items():
            assert_tells(found.outline(name), tensor)
            assert_same(found[name], tensor)


def test_the_index_leads_to_the_set_as_well(folder: Path) -> None:
    found = PlainSource(folder / "layers.json")
    assert_same(found["layer"], small())
    assert found.provenance["note"] == "ä"
    assert found.outline("layer").made == {"seed": 1}
    with pytest.raises(KeyError):
        found["other"]


def test_it_is_found_by_its_index(folder: Path) -> None:
    assert isinstance(open_source(folder), PlainSource)
    assert isinstance(open_source(folder / "layers.json"), PlainSource)


def test_a_reader_without_any_library(tmp_path: Path) -> None:
    tensor = random_tensor(PRESETS["vq-256x8"], 32, 80)
    save_plain(tmp_path / "set", {"down": tensor})
    (entry,) = index_of(tmp_path / "set")["tensors"]
    assert [part["file"] for part in entry["parts"].values()] == [
        "down.idx.bin",
        "down.codebook.bin",
    ]
    codes = (tmp_path / "set/down.idx.bin").read_bytes()
    book = (tmp_path / "set/down.codebook.bin").read_bytes()
    assert entry["parts"]["codes"]["shape"] == [32, 10, 1]
    weight = np.array(
        [
            [
                np.frombuffer(book, "<f2", 1, 2 * (8 * codes[row * 10 + column // 8] + column % 8))
                for column in range(80)
            ]
            for row in range(32)
        ]
    )[..., 0]
    assert np.array_equal(weight, tensor.decode(torch.float16).numpy())


def test_a_file_for_each_part_of_each_layer(folder: Path) -> None:
    parts = small().parts
    stems = {"codes": "idx"}
    expected = {f"layer.{stems.get(part, part)}.bin" for part in parts}
    assert {path.name for path in folder.iterdir()} == expected | {"layers.json"}
    assert {"layer.codebook_0.bin", "layer.codebook_1.bin", "layer.permutation.bin"} <= expected


# ------------------------------------------------------------------------------------------------
# names


def test_names_of_any_kind(tmp_path: Path) -> None:
    saved = {name: random_tensor(SPEC, 6, 9, seed=seed) for seed, name in enumerate(NAMES)}
    save_plain(tmp_path / "set", saved)
    found = PlainSource(tmp_path / "set")
    assert list(found) == list(NAMES)
    for name, tensor in saved.items():
        assert_same(found[name], tensor)
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    names = [path.name for path in (tmp_path / "set").iterdir()]
    assert len({name.lower() for name in names}) == 1 + len(NAMES) * len(saved["a"].parts)
    assert all(name.isascii() and not name.startswith(".") for name in names)


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40))
def test_a_short_name_can_be_had_back(name: str) -> None:
    file = plain.file_name(name, "codes", 1)
    assert file == file.lower()
    assert "/" not in file
    if "~" not in file:
        assert unquote(file.removesuffix(".idx.bin")) == name


def test_a_name_with_a_percent_sign_is_told_from_what_it_would_mean() -> None:
    files = [plain.file_name(name, "codes", 1) for name in ("%2e", ".", "%252e")]
    assert files == ["%252e.idx.bin", "%2e.idx.bin", "%25252e.idx.bin"]


def test_a_long_name_is_cut_and_told_apart() -> None:
    first, second = (plain.file_name("x" * 1023 + end, "outlier_codebook", 1) for end in "ab")
    assert first != second
    assert first.startswith("xxx")
    assert len(first) < 200


# ------------------------------------------------------------------------------------------------
# writing


def test_an_earlier_set_is_replaced_as_a_whole(folder: Path) -> None:
    old = PlainSource(folder)
    save_plain(folder, {"new": old["layer"]})
    assert list(PlainSource(folder)) == ["new"]
    assert not list(folder.glob("layer.*"))
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["notes.txt", "sub", "alone.bin"])
def test_a_folder_of_something_else_is_left_alone(name: str, tmp_path: Path, folder: Path) -> None:
    if name == "alone.bin":
        (folder / "layers.json").unlink()
    (folder / name).mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(ContainerError, match=r"set: holds '.*', which is of no earlier set"):
        save_plain(folder, {"layer": small()})
    assert sorted(folder.iterdir()) == before


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    save_plain(tmp_path, {"layer": small()})
    assert list(PlainSource(tmp_path)) == ["layer"]


def test_nothing_is_left_of_what_fails(folder: Path) -> None:
    bad = small().replace_parts(scale=torch.full((6,), float("nan"), dtype=torch.float16))
    with pytest.raises(TensorError, match=r"set: tensor 'b': scale holds NaN"):
        save_plain(folder, {"a": small(), "b": bad})
    with pytest.raises(ContainerError, match=r"set: no tensors"):
        save_plain(folder, {})
    (folder.parent / "file").touch()
    with pytest.raises(ContainerError, match=r"file: is a file"):
        save_plain(folder.parent / "file", {"a": small()})
    with pytest.raises(ContainerError, match=r"none/set: .*make the folder first"):
        save_plain(folder.parent / "none/set", {"a": small()})
    assert_same(PlainSource(folder)["layer"], small())
    assert {path.name for path in folder.parent.iterdir()} == {"set", "file"}


def test_what_there_is_no_room_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(ContainerError, match=r"set: needs \d+ bytes, but its disk has 9"):
        save_plain(folder, {"layer": small()})


def test_a_set_whose_writing_was_cut_short_is_none(folder: Path) -> None:
    (folder / "layers.json").unlink()
    with pytest.raises(ContainerError, match=r"layers\.json: there is no such file.*half of one"):
        PlainSource(folder)


# ------------------------------------------------------------------------------------------------
# damage


def refused(folder: Path, says: str) -> None:
    with pytest.raises(VqError, match=says) as caught:
        PlainSource(folder)["layer"]
    assert str(caught.value).startswith(f"{folder / 'layers.json'}: ")
    assert "\n" not in str(caught.value)


def write_index(folder: Path, content: Any) -> None:
    files = redescribed(content, _files(folder))
    (folder / "layers.json").write_text(json.dumps(files))


def _files(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    parts = index_of(folder)["tensors"][0]["parts"]
    for part, entry in parts.items():
        yield "layer", part, (folder / entry["file"]).read_bytes()


def whole() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as parent:
        save_plain(Path(parent, "set"), {"layer": small()})
        return {path.name: path.read_bytes() for path in sorted(Path(parent, "set").iterdir())}


WHOLE = whole()


def check_damaged(name: str, content: bytes) -> None:
    """Raise AssertionError unless a set whose file `name` has `content` is refused, or the same."""
    with tempfile.TemporaryDirectory() as folder:
        for file, data in {**WHOLE, name: content}.items():
            Path(folder, file).write_bytes(data)
        try:
            assert_same(PlainSource(folder)["layer"], small())
            assert name == "layers.json"  # white space
            return
        except VqError as error:
            message = str(error)
        assert message.startswith(f"{Path(folder, 'layers.json')}: ")
        assert "\n" not in message


@settings(max_examples=150)
@given(st.randoms(use_true_random=False))
def test_no_flipped_bit_changes_a_weight(random: Any) -> None:
    name = random.choice(list(WHOLE))
    content = bytearray(WHOLE[name])
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    check_damaged(name, bytes(content))


@pytest.mark.sweep
@pytest.mark.parametrize("name", WHOLE)
def test_every_third_bit_flipped_changes_no_weight(name: str) -> None:
    for bit in range(0, len(WHOLE[name]) * 8, 3):
        content = bytearray(WHOLE[name])
        content[bit // 8] ^= 1 << bit % 8
        check_damaged(name, bytes(content))


@pytest.mark.parametrize("length", [0, 5, 11, 13, 100])
def test_a_file_of_another_size(length: int, folder: Path) -> None:
    path = folder / "layer.scale.bin"
    path.write_bytes(path.read_bytes()[:length].ljust(length))
    refused(folder, f"tensor 'layer': scale: 'layer.scale.bin' has {length} bytes, but .* needs 12")


def test_a_file_that_is_missing(folder: Path) -> None:
    (folder / "layer.idx.bin").unlink()
    refused(folder, "tensor 'layer': codes: 'layer.idx.bin' is missing; copy it again")


def test_two_files_changed_for_each_other(folder: Path) -> None:
    save_plain(folder, {"layer": small(), "other": random_tensor(SPEC, 6, 9, seed=1, bias=True)})
    (folder / "other.scale.bin").replace(folder / "layer.scale.bin")
    (folder / "other.scale.bin").write_bytes(b"x" * 12)
    refused(folder, "tensor 'layer': scale doesn't match its checksum; copy it again")


@pytest.mark.parametrize(
    "name",
    ["../out.bin", "/out.bin", "sub/out.bin", "", "..", "a\nb.bin", "layers.json", "a\0.bin"],
)
def test_a_name_that_leads_elsewhere(name: str, folder: Path) -> None:
    os.link(folder / "layer.idx.bin", folder.parent / "out.bin")
    content = index_of(folder)
    content["tensors"][0]["parts"]["codes"]["file"] = name
    (folder / "layers.json").write_text(json.dumps(redescribed(content, ())))
    refused(folder, "tensor 'layer': codes: '.*' is no file name")


def test_a_link_or_a_pipe_in_place_of_a_file(folder: Path) -> None:
    path = folder / "layer.idx.bin"
    path.replace(folder.parent / "out.bin")
    path.symlink_to(folder.parent / "out.bin")
    refused(folder, "tensor 'layer': codes: 'layer.idx.bin' is a link or no file")
    path.unlink()
    os.mkfifo(path)
    refused(folder, "tensor 'layer': codes: 'layer.idx.bin' is a link or no file")


def test_files_that_change_under_an_open_set(folder: Path) -> None:
    source = PlainSource(folder)
    (folder / "layer.scale.bin").write_bytes(b"")
    with pytest.raises(ContainerError, match=r"tensor 'layer': scale ends 12 bytes early; copy"):
        source["layer"]
    (folder / "layer.scale.bin").unlink()
    (folder / "layer.scale.bin").symlink_to(folder / "layer.idx.bin")
    with pytest.raises(ContainerError, match=r"tensor 'layer': scale can't be read \(Too many"):
        source["layer"]


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("codes", b"\xff", "tensor 'layer': codes of stage 0 reach 255"),
        ("permutation", b"\xff", "tensor 'layer': permutation"),
        ("scale", b"\x00\x7c", "tensor 'layer': scale holds NaN or infinity"),
        ("codebook_1", b"\xc0\x7f", "tensor 'layer': codebook_1 holds NaN"),
    ],
)
def test_a_value_out_of_range(part: str, value: bytes, says: str, folder: Path) -> None:
    content = index_of(folder)
    path = folder / content["tensors"][0]["parts"][part]["file"]
    path.write_bytes(value + path.read_bytes()[len(value) :])
    write_index(folder, content)
    refused(folder, says)


@pytest.mark.parametrize("edit", DESCRIPTION_EDITS)
def test_an_edited_description(edit: str, folder: Path) -> None:
    change, says = DESCRIPTION_EDITS[edit]
    content = index_of(folder)
    text = change(content) or json.dumps(redescribed(content, ()))
    (folder / "layers.json").write_text(text)
    refused(folder, says)


def test_a_description_that_is_no_text_or_too_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "MAX_TEXT", 100)
    refused(folder, "a description of .* bytes")
    monkeypatch.undo()
    (folder / "layers.json").write_bytes(b"\xff")
    refused(folder, "the description is not JSON")
