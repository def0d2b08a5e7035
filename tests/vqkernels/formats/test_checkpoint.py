"""Checkpoint folders: what is read, and each way that index, headers and config disagree."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vqkernels.errors import ContainerError
from vqkernels.formats.checkpoint import Checkpoint, shortened

CONFIG = {"quantization_config": {"quant_method": "VPTQ"}}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.arange(4, dtype=torch.int16)}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", CONFIG)
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", CONFIG)
    places = {}
    for number, (key, value) in enumerate(TENSORS.items()):
        places[key] = f"model-0000{number}-of-00002.safetensors"
        save_file({key: value}, tmp_path / places[key])
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return tmp_path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def edit_map(folder: Path, **places: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for key, name in places.items():
        if name is None:
            del index["weight_map"][key]
        else:
            index["weight_map"][key] = name
    write_json(path, index)


def refusal(folder: Path) -> str:
    with pytest.raises(ContainerError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message.removeprefix(str(folder))


@pytest.mark.parametrize("layout", ["whole", "shards"])
def test_reads_every_tensor_from_one_file_or_shards(
    layout: str, request: pytest.FixtureRequest
) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(layout))
    assert checkpoint.method == "vptq"
    assert checkpoint.keys() == ["a", "b.c"]
    assert "a" in checkpoint
    assert "b" not in checkpoint
    for key, value in TENSORS.items():
        assert checkpoint.shape(key) == tuple(value.shape)
        assert checkpoint.dtype(key) == value.dtype
        assert torch.equal(checkpoint.read(key), value)


def test_a_lone_file_may_have_any_name(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "weights.safetensors")
    assert Checkpoint(whole).keys() == ["a", "b.c"]
    save_file(TENSORS, whole / "others.safetensors")
    assert "holds 2 .safetensors files but no model.safetensors.index.json" in refusal(whole)


def test_shards_may_be_links_as_a_download_cache_has_them(shards: Path, tmp_path: Path) -> None:
    blob = shards / "blob"
    name = shards / "model-00000-of-00002.safetensors"
    name.rename(blob)
    name.symlink_to(blob)
    assert torch.equal(Checkpoint(shards).read("a"), TENSORS["a"])


def test_what_was_read_does_not_follow_the_file(whole: Path) -> None:
    path = whole / "model.safetensors"
    read = Checkpoint(whole).read("a")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 40)
        file.write(b"\xff" * 40)
    assert torch.equal(read, TENSORS["a"])


def test_the_part_of_a_model_with_several_may_be_what_is_quantised(whole: Path) -> None:
    write_json(whole / "config.json", {"text_config": CONFIG})
    assert Checkpoint(whole).quantization == CONFIG["quantization_config"]


def test_a_tensor_that_changed_since_is_refused(whole: Path) -> None:
    checkpoint = Checkpoint(whole)
    replacement = whole / "new"
    save_file({"a": torch.zeros(3, 3), "b.c": TENSORS["b.c"]}, replacement)
    replacement.rename(whole / "model.safetensors")
    with pytest.raises(ContainerError, match="was changed since it was opened, so tensor 'a'"):
        checkpoint.read("a")


def test_an_absent_tensor_is_named(whole: Path) -> None:
    checkpoint = Checkpoint(whole)
    for look in (checkpoint.read, checkpoint.shape, checkpoint.dtype, checkpoint.file):
        with pytest.raises(ContainerError, match=r"tensor 'x' is missing.*download it again"):
            look("x")


def test_a_dtype_that_torch_lacks_is_refused_only_when_asked_for(whole: Path) -> None:
    header = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    data = len(header).to_bytes(8, "little") + header + b"\0\0"
    (whole / "model.safetensors").write_bytes(data)
    checkpoint = Checkpoint(whole)
    assert checkpoint.shape("a") == (2,)
    for look in (checkpoint.read, checkpoint.dtype):
        with pytest.raises(ContainerError, match=r"'a' has dtype F8_E8M0, which vqbench can't"):
            look("a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "is no JSON object, but list"),
        ("{", "is no valid JSON"),
        ("", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ('{"a":' + "1" * 5000 + "}", "is no valid JSON"),
        ('{"a": 1, "a": 2}', "is no valid JSON ('a' is given twice)"),
        ("{}", "has no quantization_config, so its weights are not quantised"),
        ('{"quantization_config": 3}', "quantization_config is no JSON object"),
    ],
)
def test_a_bad_config_is_refused(whole: Path, text: str, says: str) -> None:
    (whole / "config.json").write_text(text)
    message = refusal(whole)
    assert message.startswith("/config.json: ")
    assert says in message


def test_bytes_that_are_no_text_are_refused(whole: Path) -> None:
    (whole / "config.json").write_bytes(b"\xff\xfe{}\0")
    assert "is no valid JSON" in refusal(whole)


def test_a_config_without_method_is_refused(whole: Path) -> None:
    write_json(whole / "config.json", {"quantization_config": {"quant_method": 3}})
    with pytest.raises(ContainerError, match="names no quant_method; add it"):
        _ = Checkpoint(whole).method


def test_missing_files_are_named(whole: Path, tmp_path: Path) -> None:
    (whole / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refusal(whole)
    (whole / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "(pytorch_model.bin)" in (message := refusal(whole))
    assert "never loads pickles" in message
    (whole / "config.json").unlink()
    assert refusal(whole).startswith("/config.json: there is no such file")
    assert "is not a folder" in refusal(whole / "config.json")


def test_a_pipe_is_not_waited_for(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    os.mkfifo(whole / "model.safetensors")
    assert refusal(whole).startswith("/model.safetensors: is not a file")


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_truncated_file_is_refused(whole: Path, size: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(whole).startswith("/model.safetensors: is truncated, damaged or no safetensors")


def test_both_a_file_and_an_index_are_refused(shards: Path) -> None:
    save_file(TENSORS, shards / "model.safetensors")
    assert "holds both" in refusal(shards)


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "model-00001-of-00002.safetensors").unlink()
    assert refusal(shards).startswith("/model-00001-of-00002.safetensors: is missing, but")


def test_a_key_that_the_shard_lacks_is_refused(shards: Path) -> None:
    edit_map(shards, extra="model-00001-of-00002.safetensors")
    assert "tensor 'extra' is missing, but model.safetensors.index.json" in refusal(shards)


def test_a_key_that_the_index_lacks_is_refused(shards: Path) -> None:
    save_file({**TENSORS, "z": torch.ones(1)}, shards / "model-00000-of-00002.safetensors")
    edit_map(shards, **{"b.c": "model-00000-of-00002.safetensors"})
    assert "tensor 'z' is not in model.safetensors.index.json" in refusal(shards)


def test_a_key_in_the_wrong_shard_is_refused(shards: Path) -> None:
    first, second = (shards / f"model-0000{n}-of-00002.safetensors" for n in (0, 1))
    first.rename(shards / "held")
    second.rename(first)
    (shards / "held").rename(second)
    assert "tensor 'b.c' should be in model-00001-of-00002.safetensors" in refusal(shards)


def test_a_key_in_two_shards_is_refused(shards: Path) -> None:
    save_file(TENSORS, shards / "model-00001-of-00002.safetensors")
    message = refusal(shards)
    assert message.startswith("/model-00001-of-00002.safetensors: tensor 'a' is in model-00000")


@pytest.mark.parametrize(
    "name",
    [
        "../model-00000-of-00002.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "a\0.safetensors",
        "a\n.safetensors",
    ],
)
def test_a_shard_is_a_plain_name_in_its_folder(shards: Path, name: str) -> None:
    edit_map(shards, a=name)
    message = refusal(shards)
    assert message.startswith("/model.safetensors.index.json: tensor 'a' lies in ")
    assert "which is no plain name" in message


@pytest.mark.parametrize("places", [None, {}, [], {"a": 3}])
def test_an_index_without_a_map_is_refused(shards: Path, places: Any) -> None:
    write_json(shards / "model.safetensors.index.json", {"weight_map": places})
    assert refusal(shards).startswith("/model.safetensors.index.json: ")


def test_a_value_of_a_config_is_told_in_a_few_letters() -> None:
    deep: list[object] = []
    for _ in range(5000):  # too deep for repr
        deep = [deep]
    assert shortened(deep) == "a list"
    assert shortened("x\n") == "'x\\n'"
    assert shortened(None) == "None"
    assert shortened("x" * 99) == "'" + "x" * 39 + "..."
