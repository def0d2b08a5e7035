"""Tensors of a file by itself; folders are tested as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqkernels.errors import ContainerError
from vqkernels.formats import TensorFiles

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "any.name")
    return tmp_path / "any.name"


def test_a_file(path: Path) -> None:
    files = TensorFiles(path)
    assert files.files == [path]
    assert files.keys() == ["a", "b"]
    assert "b" in files
    assert "c" not in files
    assert (files.shape("b"), files.dtype("b"), files.dtype_name("a")) == (
        (2, 3),
        torch.float32,
        "BF16",
    )
    assert torch.equal(files.read("b"), TENSORS["b"])


def test_what_is_absent(path: Path) -> None:
    with pytest.raises(ContainerError, match="no such file or folder; give the path of"):
        TensorFiles(path.parent / "absent")
    with pytest.raises(ContainerError, match=r"any.name: tensor 'c' is missing"):
        TensorFiles(path).read("c")


def test_a_pickle_is_told_apart(path: Path) -> None:
    torch.save({}, path)
    with pytest.raises(ContainerError, match=r"any.name: is a zip or pickle file, .*save_file"):
        TensorFiles(path)


def test_a_file_that_was_written_again_is_refused(path: Path) -> None:
    files = TensorFiles(path)
    save_file(TENSORS, path.parent / "new")
    (path.parent / "new").replace(path)
    with pytest.raises(ContainerError, match="was changed since it was opened"):
        files.read("a")
    assert torch.equal(TensorFiles(path).read("a"), TENSORS["a"])
