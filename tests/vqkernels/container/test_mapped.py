"""A container is mapped: it takes no memory by itself, and what changes under us ends nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vqkernels.container.crafted import description_of, header_of
from vqkernels import container
from vqkernels.container import read
from vqkernels.container.mapped import MappedFile
from vqkernels.errors import ContainerError
from vqkernels.presets import PRESETS
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def resident_bytes(path: Path) -> int:
    """Memory of this process that holds pages of the file."""
    text = Path("/proc/self/smaps").read_text()
    mapped = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    assert mapped, "the file isn't mapped"
    return sum(int(size) for size in mapped) * 1024


def test_what_was_read_does_not_stay_in_memory(path: Path) -> None:
    tensors = {name: random_tensor(PRESETS["vq-256x8"], 512, 4096) for name in "abcd"}
    container.save(path, tensors)
    source = container.open_container(path)
    assert path.stat().st_size > 1_000_000
    for name in source:
        source[name]
        assert resident_bytes(path) < 100_000


def test_a_file_of_4_gb_is_opened_without_reading_it(path: Path) -> None:
    n, k = 1 << 17, 1 << 18
    spec = CodebookSpec(vector_length=8, stages=(256,))
    container.save(path, {"layer": random_tensor(spec, 64, 1024)}, usage=False)
    content = description_of(path)
    content["tensors"][0] |= {"n": n, "k": k}
    codes, book = n * k // 8, 256 * 8 * 2
    header: dict[str, Any] = {
        "__metadata__": header_of(json.dumps(content)),
        "layer/codes": {"dtype": "I32", "shape": [n, k // 32], "data_offsets": [0, codes]},
        "layer/codebook_0": {
            "dtype": "F16",
            "shape": [1, 1, 256, 8],
            "data_offsets": [codes, codes + book],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + codes + book)  # a hole: it takes no disk
    source = container.open_container(path)
    assert source.info.tensors[0].stored_bytes == codes + book > 4 << 30
    assert resident_bytes(path) < 1_000_000


@pytest.mark.parametrize("left", [0, 4096])
def test_a_file_that_is_cut_short_while_it_is_open(left: int, path: Path) -> None:
    container.save(path, {name: random_tensor(PRESETS["vq-256x8"], 256, 256) for name in "ab"})
    source = container.open_container(path)
    source["b"]
    os.truncate(path, left)
    with pytest.raises(ContainerError, match="was cut short while it was open") as caught:
        source["b"]
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_changed_while_it_is_open(path: Path) -> None:
    container.save(path, {"layer": random_tensor(PRESETS["toy-16-4"], 16, 16)})
    source = container.open_container(path)
    tensor = source["layer"]
    before = tensor.decode()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x11" * 8)
    with pytest.raises(ContainerError, match="'layer': codebook_1 doesn't match its checksum"):
        source["layer"]
    assert torch.equal(tensor.decode(), before)


def save_another(path: Path) -> None:
    container.save(path, {"other": random_tensor(PRESETS["toy-16-4"], 16, 16)})


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("before", "change", "says"),
    [
        (True, save_another, "was changed while it was opened; open it again"),
        (True, lambda path: os.truncate(path, 100), "is truncated"),
        (True, lambda path: os.truncate(path, 0), "is empty"),
        (False, save_another, "was changed while it was opened"),
        (False, lengthen, "was changed while it was opened"),
        (False, lambda path: os.truncate(path, 100), "was changed while it was opened"),
    ],
)
def test_a_file_that_is_changed_while_it_is_being_opened(
    before: bool, change: Any, says: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_it(*args: Any, **options: Any) -> Any:
        if before:
            change(path)
        opened = safe_open(*args, **options)
        if not before:
            change(path)
        return opened

    container.save(path, {"layer": random_tensor(PRESETS["toy-16-4"], 16, 16)})
    safe_open = read.safe_open
    monkeypatch.setattr(read, "safe_open", change_it)
    with pytest.raises(ContainerError, match=says):
        container.open_container(path)


def test_a_file_that_is_cut_short_before_it_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    with (tmp_path / "x").open("rb") as file:
        assert len(MappedFile(file, 4)) == 4
        with pytest.raises(ContainerError, match="was cut short while it was opened"):
            MappedFile(file, 5)
