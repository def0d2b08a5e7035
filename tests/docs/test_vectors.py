"""The test vectors are what this build reads and writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.docs import vectors
from vqkernels import container
from vqkernels.formats import open_source
from vqkernels.parallel import save_parallel

FOLDER = Path(__file__).parents[2] / "docs" / "vectors"

FILES = ("packed", "few-words", "ans", "ans-usage", "version-1")
SETS = {"packed.safetensors": "", "version-1.safetensors": "version-1/"}
SETS |= {name: f"{name}/" for name in ("shards", "ranks")}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_verified(name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    assert container.load(path, decoded=True)


@pytest.mark.parametrize("name", SETS)
def test_it_decodes_as_expected(name: str) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    source = open_source(FOLDER / name)
    for key, tensor in source.items():
        found, right = tensor.decode(), expected[f"{SETS[name]}{key}"]
        if tensor.spec.rotation_size:
            assert torch.allclose(found, right, rtol=0, atol=1e-12)
        else:
            assert torch.equal(found, right)


@pytest.mark.parametrize(
    ("name", "options"),
    [("packed", {}), ("ans", {"codes": "ans", "usage": False}), ("ans-usage", {"codes": "ans"})],
)
def test_a_file_is_written_the_same_again(name: str, options: dict, tmp_path: Path) -> None:
    source = container.open_container(FOLDER / f"{name}.safetensors")
    made = {one.name: one.made for one in source.info.tensors if one.made}
    again = tmp_path / "again.safetensors"
    container.save(again, source, provenance=source.info.provenance, made=made, **options)
    assert again.read_bytes() == source.path.read_bytes()


def test_sets_are_written_the_same_again(tmp_path: Path) -> None:
    shards = open_source(FOLDER / "shards")
    container.save_shards(tmp_path / "shards", shards, shard_bytes=400, provenance=vectors.ORIGIN)
    assert contents(tmp_path / "shards") == contents(FOLDER / "shards")
    ranks = open_source(FOLDER / "ranks")
    save_parallel(tmp_path / "ranks", ranks, ranks=3, shard_bytes=9000, provenance=vectors.ORIGIN)
    assert contents(tmp_path / "ranks") == contents(FOLDER / "ranks")


def test_they_can_be_made_anew(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "version-1.safetensors", tmp_path)
    vectors.write(tmp_path)
    # a rotation comes from LAPACK, whose last bits are a machine's own
    assert contents(tmp_path).keys() == contents(FOLDER).keys()
    for name in ("ans.safetensors", "ans-usage.safetensors", "shards/model.safetensors.index.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
