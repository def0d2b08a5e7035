"""Files are written whole or not at all: by way of the container, which is what writes most."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vqkernels import atomic, container
from vqkernels.atomic import locked, staged
from vqkernels.errors import ContainerError, TensorError
from vqkernels.presets import PRESETS
from vqkernels.tensor import random_tensor

SMALL = {"layer": random_tensor(PRESETS["toy-16-4"], 16, 16)}
LARGER = {"layer": random_tensor(PRESETS["vq-256x8"], 256, 128)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layer.safetensors"


@pytest.fixture(params=["new", "existing"])
def target(request: pytest.FixtureRequest, path: Path) -> Iterator[Path]:
    """A path to save to; afterwards it must be as it was, with nothing beside it."""
    before = b"what was here before" if request.param == "existing" else None
    if before is not None:
        path.write_bytes(before)
    yield path
    assert (path.read_bytes() if path.exists() else None) == before
    assert [entry.name for entry in path.parent.iterdir()] == ([path.name] if before else [])


def fails_to_save(path: Path, says: str) -> None:
    with pytest.raises(ContainerError, match=says) as caught:
        container.save(path, LARGER)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def raiser(error: BaseException) -> Any:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    return fail


def test_a_full_disk_is_seen_before_writing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(Path, "open", lambda *args: opened.append(args))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9999, 9000, 999))
    fails_to_save(target, r"needs \d,\d{3} bytes, but its disk has 999 left; free some space")
    assert not opened


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "No space left.*free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "Permission denied.*may write"),
        (errno.EIO, "check the disk"),
    ],
)
def test_an_error_of_the_disk(
    call: str, code: int, says: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os if call == "fsync" else Path
    monkeypatch.setattr(owner, call, raiser(OSError(code, os.strerror(code))))
    fails_to_save(target, says)


def test_a_write_that_the_system_cuts_short(target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        fails_to_save(target, "File too large.*ulimit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("owner", [os, Path], ids=["while writing", "before the rename"])
def test_ctrl_c_leaves_nothing(owner: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = "fsync" if owner is os else "replace"
    monkeypatch.setattr(owner, call, raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        container.save(target, LARGER)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    fails_to_save(tmp_path / "none" / "x.safetensors", "make the folder first")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fails_to_save(tmp_path / "file" / "x.safetensors", "make the folder first")


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    fails_to_save(folder, "it is a folder")
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_an_existing_file_is_replaced_in_one_step(path: Path) -> None:
    container.save(path, {"old": SMALL["layer"]})
    with path.open("rb") as old:
        container.save(path, {"new": LARGER["layer"]})
        # whoever had it open still reads the old one, whole: it wasn't written over
        assert b"old/codes" in old.read()
    assert list(container.load(path)) == ["new"]
    assert list(path.parent.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_they_get_the_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))
        fsync(descriptor)

    def log_replace(self: Path, new: Path) -> Path:
        assert self.parent == new.parent
        events.append(("rename", None))
        return replace(self, new)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    container.save(path, SMALL)
    assert events == [("file", path.stat().st_size), ("rename", None), ("folder", None)]


def test_the_mode_is_that_of_any_new_file(path: Path) -> None:
    umask = os.umask(0o027)
    try:
        container.save(path, SMALL)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_lock_is_held_until_its_end(path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked(path):
            entered.set()

    other = threading.Thread(target=enter)
    with locked(path):
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(60)
    other.join()
    assert not path.exists()


def test_a_lock_that_another_has_can_be_refused(path: Path) -> None:
    with (
        locked(path),
        pytest.raises(ContainerError, match=f"{path}: another process is writing it"),
        locked(path, wait=False),
    ):
        pass
    with locked(path, wait=False):
        pass


def test_a_lock_is_of_the_folder_that_has_the_name(tmp_path: Path) -> None:
    """Of two that wait, the second must not get the folder that the one before has removed."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    got = threading.Event()

    def wait() -> None:
        with locked(path):
            got.set()
            with pytest.raises(ContainerError, match="another"), locked(path, wait=False):
                pass

    waiting = threading.Thread(target=wait)
    with locked(path):
        waiting.start()
        assert not got.wait(0.2)  # by now it has the old folder open
        path.parent.rename(tmp_path / "old")
        path.parent.mkdir()
    assert got.wait(60)
    waiting.join()


def test_a_lock_that_can_not_be_made(tmp_path: Path) -> None:
    with (
        pytest.raises(ContainerError, match=r"no/such/t.json: can't be locked: .*make the folder"),
        locked(tmp_path / "no/such/t.json"),
    ):
        pass


# ------------------------------------------------------------------------------------------------
# files and folders that are staged


def test_a_staged_file_gets_its_name_at_the_end(path: Path) -> None:
    path.write_text("old")
    with staged(path) as made:
        made.write_text("new")
        assert made.name == path.name
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def fill(made: Path) -> None:
    (made / "sub").mkdir(parents=True)
    (made / "sub/file").write_text("new")


def interrupt(made: Path, error: BaseException) -> None:
    fill(made)
    raise error


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a folder", "a file", "a link"])
@pytest.mark.parametrize("swaps", [True, False])
def test_a_staged_folder_replaces_what_is_there(
    there: str, swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(atomic, "_swapped", lambda *_: False)
    path, other = tmp_path / "set", tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    if "folder" in there:
        path.mkdir()
    if there == "a folder":
        (path / "old").touch()
    if there == "a file":
        path.touch()
    if there == "a link":
        path.symlink_to(other)
    with staged(path) as made:
        fill(made)
    assert not path.is_symlink()
    assert [entry.name for entry in path.iterdir()] == ["sub"]
    assert (path / "sub/file").read_text() == "new"
    assert list(other.iterdir()) == [other / "kept"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"set", "other"}


def test_names_are_swapped_in_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("one")
    other.write_text("other")
    if not atomic._swapped(one, other):
        pytest.skip("this file system can't exchange names")
    assert (one.read_text(), other.read_text()) == ("other", "one")
    assert not atomic._swapped(one, tmp_path / "none")
    assert one.read_text() == "other"


@pytest.mark.parametrize("step", [0, 1])
def test_a_folder_is_put_back_if_its_successor_can_not_be(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").touch()
    rename, calls = Path.rename, []

    def interrupted(self: Path, new: Path) -> Path:
        calls.append(new)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return rename(self, new)

    monkeypatch.setattr(atomic, "_swapped", lambda *_: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(path) as made:
        fill(made)
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(errno.EIO, "EIO")])
def test_what_ends_the_block_leaves_nothing(error: BaseException, path: Path) -> None:
    kind = ContainerError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind), staged(path) as made:
        interrupt(made, error)
    assert list(path.parent.iterdir()) == []


def test_errors_name_the_path_and_not_where_it_is_staged(path: Path) -> None:
    with pytest.raises(TensorError, match=f"^{path}: {path}/x: no$"), staged(path) as made:
        raise TensorError(f"{made}: {made}/x: no")
    with pytest.raises(ContainerError, match=rf"^{path}: can't be written \(No such"), staged(path):
        pass


def test_a_disk_too_small_is_seen_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9999, 9000, 999))
    with pytest.raises(ContainerError, match="needs 1,000 bytes, but its disk has 999 left"):
        staged(path, need=1000).__enter__()
    with staged(path, need=999) as made:
        made.touch()


def test_staged_bytes_are_on_the_disk_before_they_get_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def log_replace(self: Path, new: Path) -> Path:
        events.append("rename")
        return replace(self, new)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    with staged(tmp_path / "set") as made:
        fill(made)
    assert events == ["folder", "folder", "file", "rename", "folder"]
