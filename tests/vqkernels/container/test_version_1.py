"""Files of the first container version are read as ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.vqkernels.container.crafted import (
    NAMES,
    Entry,
    assemble,
    description_of,
    header_of,
    raw,
    refused,
)
from vqkernels import container
from vqkernels.errors import ContainerError, VqError

# Written by vqbench 0.1.0 with `container.save`; two matrices, bias and permutation included.
FILE = Path(__file__).parents[3] / "docs" / "vectors" / "version-1.safetensors"


def entries() -> list[Entry]:
    """Its tensors, narrowest elements first: not as the file has them."""
    with safe_open(FILE, "pt") as file:
        found = {key: file.get_tensor(key) for key in reversed(file.offset_keys())}
    return [
        (key, NAMES[value.dtype], list(value.shape), raw(value)) for key, value in found.items()
    ]


def test_it_is_read_and_verified() -> None:
    info = container.describe(FILE)
    assert (info.version, info.spec_version) == (1, 1)
    assert info.provenance["note"] == "written by vqbench 0.1.0"
    loaded = container.load(FILE, decoded=True)
    assert list(loaded) == ["é/layer", "b"]
    with safe_open(FILE, "pt") as file:
        assert torch.equal(loaded["b"].parts["scale"], file.get_tensor("b/scale"))
    for tensor in info.tensors:
        assert tensor.coding == ("packed", "packed")
        assert not tensor.usage
        assert tensor.made == {}
        assert "usage_0" not in tensor.checksums


def test_writing_it_again_makes_the_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    container.save(path, container.open_container(FILE))
    old, new = container.describe(FILE), container.describe(path)
    assert new.version == container.CONTAINER_VERSION
    assert [t.decoded_checksum for t in new.tensors] == [t.decoded_checksum for t in old.tensors]


@pytest.mark.parametrize("align", [8, 1])
def test_its_parts_may_lie_anywhere(align: int, tmp_path: Path) -> None:
    # fine for the library, though no CPU's vector load would like it: parts are copied out
    path = tmp_path / "x.safetensors"
    text = json.dumps(description_of(FILE))
    path.write_bytes(assemble(header_of(text), entries(), align=align))
    loaded = container.load(path, decoded=True)
    for name, tensor in container.load(FILE).items():
        assert torch.equal(loaded[name].decode(), tensor.decode())


def test_it_has_no_pads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = header_of(json.dumps(description_of(FILE)))
    path.write_bytes(assemble(header, [*entries(), ("~0", "U8", [4], bytes(4))]))
    refused(path, ContainerError, "'~0' belongs to no tensor")


def test_any_damage_is_an_error(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.safetensors", FILE.read_bytes()
    for place in range(0, len(whole), 29):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        refused(path, VqError, ".")
