"""Files that were written one by one, joined: the bytes of one that was written at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqkernels import container
from vqkernels.container.join import join, join_shards
from vqkernels.container.manifest import Coding
from vqkernels.errors import ContainerError
from vqkernels.presets import PRESETS
from vqkernels.tensor import random_tensor

TENSORS = {
    "first": random_tensor(PRESETS["toy-16-4"], 33, 48, seed=1, bias=True),
    "then": random_tensor(PRESETS["vq-256x8"], 128, 64, seed=2),
    "last": random_tensor(PRESETS["aqlm-2x8"], 64, 64, seed=3),
}
MADE = {"then": {"method": "vq", "error": 0.25}}
ORIGIN = {"source": "x"}


@pytest.fixture(params=["packed", "ans"])
def codes(request: pytest.FixtureRequest) -> Coding:
    coding: Coding = request.param
    return coding


@pytest.fixture
def files(tmp_path: Path, codes: Coding) -> list[Path]:
    """The tensors in two files; what a file says of its origin is its own."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, names in zip(paths, (["first"], ["then", "last"]), strict=True):
        container.save(
            path,
            {name: TENSORS[name] for name in names},
            provenance={"source": path.name},
            made={name: MADE[name] for name in names if name in MADE},
            codes=codes,
        )
    return paths


def test_one_file(files: list[Path], codes: Coding, tmp_path: Path) -> None:
    join(tmp_path / "joined", files, provenance=ORIGIN)
    container.save(tmp_path / "whole", TENSORS, provenance=ORIGIN, made=MADE, codes=codes)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_shards(files: list[Path], codes: Coding, tmp_path: Path) -> None:
    whole, joined = tmp_path / "whole", tmp_path / "joined"
    options = {"shard_bytes": 5000, "provenance": ORIGIN}
    join_shards(joined, files, **options)
    container.save_shards(whole, TENSORS, made=MADE, codes=codes, **options)
    found, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (joined, whole)
    )
    assert found == expected
    assert len(found) > 2


def test_order_is_that_of_the_files(files: list[Path], tmp_path: Path) -> None:
    join(tmp_path / "joined", files[::-1])
    assert list(container.load(tmp_path / "joined", decoded=True)) == ["then", "last", "first"]


def test_files_must_be_containers(files: list[Path], tmp_path: Path) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ContainerError, match=rf"{files[1]}: is truncated"):
        join(tmp_path / "joined", files)
    assert not (tmp_path / "joined").exists()
