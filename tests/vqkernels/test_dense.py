"""A model's dense tensors, from a checkpoint or an imported folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqkernels.container.shards import save_shards
from vqkernels.dense import DENSE_CHECKSUM, DENSE_FILE, DenseFile, open_dense
from vqkernels.errors import ContainerError
from vqkernels.formats import vptq
from vqkernels.presets import parse_format
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor

DENSE = {"norm.weight": torch.arange(5.0).half(), "steps": torch.tensor(7)}


def imported(folder: Path, *, checked: bool = True) -> Path:
    folder.mkdir()
    save_file(DENSE, folder / DENSE_FILE)
    digest = hashlib.sha256((folder / DENSE_FILE).read_bytes()).hexdigest()
    tensors = {"up": random_tensor(parse_format("vq-4x4"), 8, 8)}
    told = {DENSE_CHECKSUM: digest} if checked else {}
    save_shards(folder, tensors, shard_bytes=1 << 20, provenance=told)
    return folder


def unchecked(folder: Path) -> Path:
    return imported(folder, checked=False)


def checkpoint(folder: Path) -> Path:
    spec = CodebookSpec(method="vptq", vector_length=4, stages=(4,), vector_axis="out")
    vptq.export(folder, {"up": random_tensor(spec, 8, 8)}, dense=DENSE)
    return folder


@pytest.mark.parametrize("make", [imported, unchecked, checkpoint])
def test_dense_tensors_are_as_they_were(tmp_path, make):
    dense = open_dense(make(tmp_path / "model"))
    assert set(dense) == set(DENSE)
    for name, value in DENSE.items():
        assert dense[name].dtype == value.dtype
        assert torch.equal(dense[name], value)
    with pytest.raises(KeyError):
        dense["up"]


def test_one_changed_bit_is_seen(tmp_path):
    folder = imported(tmp_path / "model")
    path = folder / DENSE_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert set(DenseFile(path)) == set(DENSE), "what is stored can't show it"
    with pytest.raises(ContainerError, match=r"dense\.safetensors: doesn't match its checksum"):
        open_dense(folder)


def test_a_folder_without_dense_tensors_says_what_to_give(tmp_path):
    folder = imported(tmp_path / "model")
    (folder / DENSE_FILE).unlink()
    with pytest.raises(ContainerError, match=r"model: holds no dense\.safetensors, and is no") as e:
        open_dense(folder)
    assert "\n" not in str(e.value)
    with pytest.raises(ContainerError, match="absent"):
        open_dense(tmp_path / "absent")
