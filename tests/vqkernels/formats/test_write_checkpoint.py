"""Checkpoint folders are written whole or not at all, a group of tensors at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vqkernels.errors import ContainerError, TensorError
from vqkernels.formats.checkpoint import Checkpoint
from vqkernels.formats.write_checkpoint import Group, write_checkpoint

CONFIG = {"quantization_config": {"quant_method": "none"}, "name": "ä"}
KINDS = [
    torch.ones(3, dtype=torch.uint8),
    torch.arange(5, dtype=torch.int32),
    torch.tensor(2.5),
    torch.randn(2, 3).to(torch.bfloat16),
    torch.tensor([True, False, True]),
    torch.arange(3),
    torch.zeros(0, 4, dtype=torch.float16),
    torch.randn(4, 3).T,
]


def group_of(**tensors: Tensor) -> Group:
    entries = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    return Group(entries, lambda: tensors)


def failing(error: BaseException) -> Group:
    def make() -> NoReturn:
        raise error

    return Group({"z": ((4,), torch.float32)}, make)


@pytest.mark.parametrize("shard_bytes", [1, 40, 10_000])
def test_every_dtype_comes_back(shard_bytes: int, tmp_path: Path) -> None:
    groups = [group_of(**{f"t{i}": value}) for i, value in enumerate(KINDS)]
    write_checkpoint(tmp_path / "out", CONFIG, groups, shard_bytes=shard_bytes)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config == CONFIG
    assert checkpoint.keys() == [f"t{i}" for i in range(len(KINDS))]
    for i, value in enumerate(KINDS):
        assert checkpoint.dtype(f"t{i}") == value.dtype
        assert torch.equal(checkpoint.read(f"t{i}"), value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_lie_at_multiples_of_their_width(tmp_path: Path) -> None:
    groups = [group_of(**{f"t{i}": value}) for i, value in enumerate(KINDS)]
    write_checkpoint(tmp_path / "out", CONFIG, groups)
    path = tmp_path / "out/model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert size % 8 == 0
    header = json.loads(path.read_bytes()[8 : 8 + size])
    for i, value in enumerate(KINDS):
        assert header[f"t{i}"]["data_offsets"][0] % value.element_size() == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        groups = [group_of(x=KINDS[0], y=KINDS[1]), group_of(z=KINDS[2])]
        write_checkpoint(tmp_path / name, CONFIG, groups)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_empty_folder_may_be_there_but_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_checkpoint(folder, CONFIG, [group_of(x=KINDS[0])])
    assert set(load_file(folder / "model.safetensors")) == {"x"}
    for taken in (folder, folder / "config.json"):
        with pytest.raises(ContainerError, match="holds something already; name a new folder"):
            write_checkpoint(taken, CONFIG, [group_of(y=KINDS[0])])
    assert set(load_file(folder / "model.safetensors")) == {"x"}


def test_no_folder_to_write_in(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="make the folder first"):
        write_checkpoint(tmp_path / "a" / "b", CONFIG, [group_of(x=KINDS[0])])


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(ContainerError, match=r"can't be read \(Permission"):
        write_checkpoint(tmp_path, CONFIG, [group_of(x=KINDS[0])])


@pytest.mark.parametrize("error", [TensorError("bad"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("shard_bytes", [1, 10_000])
def test_a_failure_on_the_way_leaves_nothing(
    error: BaseException, shard_bytes: int, tmp_path: Path
) -> None:
    groups = [group_of(x=KINDS[0]), failing(error), group_of(y=KINDS[0])]
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "out", CONFIG, groups, shard_bytes=shard_bytes)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContainerError, match="free some space"):
        write_checkpoint(
            tmp_path / "out", CONFIG, [group_of(x=torch.empty(1 << 60, device="meta"))]
        )
    assert not any(tmp_path.iterdir())


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"out/config\.json: no JSON"):
        write_checkpoint(tmp_path / "out", {"x": {1, 2}}, [group_of(x=KINDS[0])])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([], "no tensors to write"),
        ([group_of(x=KINDS[0]), group_of(x=KINDS[1])], "tensor 'x' is there twice"),
        ([group_of(x=torch.ones(1, dtype=torch.complex64))], "is torch.complex64, which can't"),
    ],
)
def test_groups_that_make_no_file_are_refused(
    groups: list[Group], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ContainerError, match=says):
        write_checkpoint(tmp_path / "out", CONFIG, groups)
    assert not any(tmp_path.iterdir())


def _write_and_die(folder: Path) -> None:
    def die() -> Mapping[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    last = Group({"z": ((4,), torch.float32)}, die)
    write_checkpoint(folder, CONFIG, [group_of(x=KINDS[1]), last], shard_bytes=1)


def test_what_a_killed_process_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_write_and_die, args=(tmp_path / "out",))
    with warnings.catch_warnings():  # Python 3.12 warns of threads, which the child doesn't use
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    for folder in (left, left / "out"):
        with pytest.raises(ContainerError):
            Checkpoint(folder)
    write_checkpoint(tmp_path / "out", CONFIG, [group_of(x=KINDS[1])])
    assert Checkpoint(tmp_path / "out").keys() == ["x"]
