from __future__ import annotations

import json
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
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
from vqkernels.formats import description, npz, open_source
from vqkernels.formats.npz import NpzSource, save_npz
from vqkernels.tensor import QuantizedTensor, random_tensor

Arrays = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    save_npz(path, {"layer": small()}, provenance={"note": "ä"})
    return path


def arrays_of(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def description_of(path: Path) -> Any:
    return json.loads(arrays_of(path)["__vqbench__"].tobytes())


# ------------------------------------------------------------------------------------------------
# round trips


@settings(max_examples=50)
@given(st.lists(quantized_tensors(max_side=12), min_size=1, max_size=3))
def test_any_format_survives(tensors: list[QuantizedTensor]) -> None:
    saved = {f"layer.{number}": tensor for number, tensor in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.npz")
        save_npz(path, saved)
        found = NpzSource(path)
        assert list(found) == list(saved)
        assert len(found) == len(saved)
        for name, tensor in saved.items():
            assert_tells(found.outline(name), tensor)
            assert_same(found[name], tensor)


def test_numpy_reads_it(path: Path) -> None:
    tensor = random_tensor(SPEC, 6, 9, bias=True)
    arrays = arrays_of(path)
    assert set(arrays) == {"__vqbench__", *(f"layer/{part}" for part in tensor.parts)}
    assert arrays["layer/codes"].dtype == np.uint8
    assert np.array_equal(arrays["layer/codes"], tensor.parts["codes"].numpy())
    assert np.array_equal(arrays["layer/scale"], tensor.parts["scale"].numpy())
    book = arrays["layer/codebook_0"]  # bfloat16: the upper half of a float32
    assert book.dtype == np.uint16
    values = (book.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(values, tensor.parts["codebook_0"].float().numpy())


def test_the_description_names_the_dtypes_that_are_meant(path: Path) -> None:
    content = description_of(path)
    assert content["provenance"]["note"] == "ä"
    assert NpzSource(path).provenance == content["provenance"]
    (entry,) = content["tensors"]
    assert (entry["n"], entry["k"], entry["bias"]) == (6, 9, True)
    assert entry["parts"]["codebook_0"]["dtype"] == "bfloat16"
    assert entry["parts"]["codebook_0"]["shape"] == [1, 1, 5, 2]


def test_arrays_that_numpy_saved_again_are_read(path: Path) -> None:
    np.savez(path, **arrays_of(path))
    assert_same(NpzSource(path)["layer"], small())


def test_names_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    saved = {name: random_tensor(SPEC, 6, 9, seed=seed) for seed, name in enumerate(NAMES)}
    save_npz(path, saved)
    found = NpzSource(path)
    assert list(found) == list(NAMES)
    for name, tensor in saved.items():
        assert_same(found[name], tensor)
    assert set(arrays_of(path)) >= {f"{name}/codes" for name in NAMES}


def test_equal_tensors_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    save_npz(tmp_path / "y.npz", {"layer": small()}, provenance={"note": "ä"})
    assert (tmp_path / "y.npz").read_bytes() == path.read_bytes()


def test_how_a_matrix_was_made_is_kept(path: Path) -> None:
    made = {"method": "rq", "seed": 3, "clip": [-1.5, 2.0]}
    save_npz(path, {"a": small(), "b": small()}, made={"a": made})
    found = NpzSource(path)
    assert found.outline("a").made == {**made, "clip": (-1.5, 2.0)}
    assert found.outline("b").made == {}
    with pytest.raises(ContainerError, match=r"x\.npz: tensor 'a': made: .*; leave it out or"):
        save_npz(path, {"a": small()}, made={"a": {"seed": 1.5}})
    with pytest.raises(ContainerError, match=r"x\.npz: made is of 'c', which is no tensor"):
        save_npz(path, {"a": small()}, made={"c": made})


def test_it_is_found_by_its_name(path: Path) -> None:
    assert isinstance(open_source(path), NpzSource)


def test_an_unknown_name_is_a_key_error(path: Path) -> None:
    assert "other" not in NpzSource(path)
    with pytest.raises(KeyError):
        NpzSource(path)["other"]
    with pytest.raises(KeyError):
        NpzSource(path).outline("other")


# ------------------------------------------------------------------------------------------------
# writing


def test_one_matrix_at_a_time_is_asked_for(tmp_path: Path) -> None:
    asked = []

    class Source(dict[str, QuantizedTensor]):
        def __getitem__(self, name: str) -> QuantizedTensor:
            asked.append((name, [entry.name[:9] for entry in tmp_path.iterdir()]))
            return super().__getitem__(name)

    save_npz(tmp_path / "x.npz", Source(a=small(), b=small()))
    # the first time for the sizes, by which the disk's room is checked
    assert asked == [("a", []), ("b", []), ("a", [".vqbench-"]), ("b", [".vqbench-"])]


def test_nothing_is_left_of_what_fails(path: Path) -> None:
    before = path.read_bytes()
    bad = small().replace_parts(scale=torch.full((6,), float("nan"), dtype=torch.float16))
    with pytest.raises(TensorError, match=r"x\.npz: tensor 'b': scale holds NaN"):
        save_npz(path, {"a": small(), "b": bad})
    with pytest.raises(ContainerError, match=r"x\.npz: no tensors"):
        save_npz(path, {})
    with pytest.raises(ContainerError, match=r"x\.npz: 'a\\nb' can't name"):
        save_npz(path, {"a\nb": small()})
    with pytest.raises(ContainerError, match=r"x\.npz: provenance"):
        save_npz(path, {"a": small()}, provenance={"seed": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_there_is_no_room_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(ContainerError, match=r"x\.npz: needs \d+ bytes, but its disk has 9"):
            save_npz(path, {"layer": small()})
    monkeypatch.setattr(description, "MAX_TEXT", 100)
    with pytest.raises(ContainerError, match=r"x\.npz: the description takes .* of at most 100;"):
        save_npz(path, {"layer": small()})
    assert path.read_bytes() == before


def test_a_write_that_the_system_cuts_short(path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ContainerError, match=r"x\.npz: .*File too large.*ulimit") as caught:
            save_npz(path, {"layer": random_tensor(SPEC, 6, 9000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ".vqbench-" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# damage


def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.npz")
        save_npz(path, {"é/layer": small()})
        return path.read_bytes()


WHOLE = whole()


def load_bytes(content: bytes) -> QuantizedTensor | str:
    """The only matrix, or the message with which the file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bad.npz")
        path.write_bytes(content)
        try:
            source = NpzSource(path)
            assert list(source) == ["é/layer"]
            return source["é/layer"]
        except VqError as error:
            message = str(error)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message


@settings(max_examples=300)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4))
def test_overwritten_bytes_change_no_weight(start: int, new: bytes) -> None:
    changed = (WHOLE[:start] + new + WHOLE[start + len(new) :])[: len(WHOLE)]
    found = load_bytes(changed)  # a zip file has dates and such, which say nothing
    if not isinstance(found, str):
        assert_same(found, small())


@pytest.mark.sweep
def test_every_third_bit_flipped_changes_no_weight() -> None:
    for bit in range(0, len(WHOLE) * 8, 3):
        changed = bytearray(WHOLE)
        changed[bit // 8] ^= 1 << bit % 8
        found = load_bytes(bytes(changed))
        if not isinstance(found, str):
            assert_same(found, small())


@settings(max_examples=100)
@given(st.integers(0, len(WHOLE) - 1))
@example(0)
@example(len(WHOLE) - 1)
def test_any_truncation_is_an_error(length: int) -> None:
    assert isinstance(load_bytes(WHOLE[:length]), str)


def refused(path: Path, says: str) -> None:
    with pytest.raises(VqError, match=says) as caught:
        NpzSource(path)["layer"]
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def put(path: Path, arrays: Arrays) -> None:
    """`arrays` as the file, the description's checksums made right."""
    content = redescribed(json.loads(arrays["__vqbench__"].tobytes()), flat(arrays))
    arrays["__vqbench__"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    np.savez(path, allow_pickle=True, **arrays)


def flat(arrays: Arrays) -> Iterator[tuple[str, str, bytes]]:
    for key, array in arrays.items():
        name, slash, part = key.rpartition("/")
        if slash and array.dtype != object:
            yield name, part, array.tobytes()


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("codes", 5, "tensor 'layer': codes of stage 0 reach 5"),
        ("uniform_codes", 8, "tensor 'layer': uniform_codes reach 8"),
        ("permutation", 9, "tensor 'layer': permutation"),
        ("scale", float("nan"), "tensor 'layer': scale holds NaN"),
        ("codebook_1", 0x7F80, "tensor 'layer': codebook_1 holds NaN or infinity"),
    ],
)
def test_a_value_out_of_range(part: str, value: float, says: str, path: Path) -> None:
    arrays = arrays_of(path)
    arrays[f"layer/{part}"].reshape(-1)[0] = value
    put(path, arrays)
    refused(path, says)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "too long": (lambda array: np.zeros(3000, np.uint8), "codes takes .* needs"),
    "another shape": (lambda array: array.reshape(-1), "codes has the header .*C order; "),
    "another dtype": (lambda array: array.view(np.int8), "codes has the header .*i1"),
    "by column": (np.asfortranarray, "codes has the header .*True"),
    "objects": (lambda array: np.array([{}], dtype=object), "codes has the header .*O"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_array_of_another_kind(change: str, path: Path) -> None:
    arrays = arrays_of(path)
    arrays["layer/codes"] = CHANGES[change][0](arrays["layer/codes"])
    put(path, arrays)
    refused(path, f"tensor 'layer': {CHANGES[change][1]}")


def test_an_array_missing_or_too_many(path: Path) -> None:
    arrays = arrays_of(path)
    np.savez(path, **arrays, other=np.zeros(3))
    refused(path, "'other.npy' belongs to no tensor")
    del arrays["layer/scale"]
    np.savez(path, **arrays)
    refused(path, "tensor 'layer': scale is missing")
    del arrays["__vqbench__"]
    np.savez(path, **arrays)
    refused(path, "without '__vqbench__'; make one")


def test_a_stored_array_that_does_not_match_its_checksum(path: Path) -> None:
    arrays = arrays_of(path)
    arrays["layer/bias"][0] += 1
    np.savez(path, **arrays)
    refused(path, "tensor 'layer': bias doesn't match its checksum; copy it again")
    assert "layer" in NpzSource(path)  # told without reading it


@pytest.mark.parametrize("edit", DESCRIPTION_EDITS)
def test_an_edited_description(edit: str, path: Path) -> None:
    change, says = DESCRIPTION_EDITS[edit]
    arrays = arrays_of(path)
    content = json.loads(arrays["__vqbench__"].tobytes())
    text = change(content) or json.dumps(redescribed(content, ()))
    arrays["__vqbench__"] = np.frombuffer(text.encode(), np.uint8)
    np.savez(path, **arrays)
    refused(path, says)


def test_a_description_changed_without_its_checksum(path: Path) -> None:
    arrays = arrays_of(path)
    text = arrays["__vqbench__"].tobytes().replace(b'"method": "vq"', b'"method": "pq"')
    np.savez(path, **{**arrays, "__vqbench__": np.frombuffer(text, np.uint8)})
    refused(path, "the description doesn't match its checksum")


def test_compressed_arrays_are_refused_before_they_are_read(path: Path) -> None:
    np.savez_compressed(path, **arrays_of(path))
    refused(path, "is compressed; save it with numpy.savez")


def test_a_file_that_claims_more_than_it_has(path: Path) -> None:
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"layer/codes.npy") - 46  # in the central directory
    assert content[entry : entry + 4] == b"PK\x01\x02"
    for at in (20, 24):  # its two sizes
        content[entry + at : entry + at + 4] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, "'layer/codes.npy' claims 2,147,483,648 bytes")


def test_a_description_that_is_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MAX_TEXT", 100)
    refused(path, r"a description of \d,\d+ bytes; copy")


def test_what_is_no_npz_file(tmp_path: Path) -> None:
    refused(tmp_path, "is not a file")
    refused(tmp_path / "none", r"can't be read \(No such file or directory\); check the path")
    (tmp_path / "x").write_bytes(b"no zip")
    refused(tmp_path / "x", "is truncated, damaged or no .npz file")
    with zipfile.ZipFile(tmp_path / "y", "w") as archive:
        archive.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "2")
    refused(tmp_path / "y", "two arrays have the same name")
