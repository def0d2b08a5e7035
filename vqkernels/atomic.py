"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from vqkernels.errors import ContainerError, VqError

__all__ = [
    "explained",
    "locked",
    "staged",
    "sync_folder",
    "write_atomically",
    "write_through",
]

_SPACE = "free some space or choose another disk"
_FOLDER = "make the folder first"
_RIGHTS = "choose a folder that you may write to"
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.ENOENT: _FOLDER,
    errno.ENOTDIR: _FOLDER,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EISDIR: "it is a folder: give the name of a file in it",
}


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold off others who would lock the folder of `path`, while `path` is read and written anew.

    The folder, since `path` itself is replaced. Raises ContainerError where there is none and,
    unless it is to `wait`, where another process has the lock.
    """
    try:
        while (folder := _lock(path.parent, wait)) is None:
            pass
    except BlockingIOError as error:
        raise ContainerError(
            f"{path}: another process is writing it; wait until it has ended, or end it"
        ) from error
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "choose another folder")
        raise ContainerError(f"{path}: can't be locked: {error.strerror}; {hint}") from error
    try:
        yield
    finally:
        os.close(folder)  # gives the lock back


def _lock(path: Path, wait: bool) -> int | None:
    """The open folder, locked; None where the one who had the lock has removed the folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a network's file system that locks no folders
        if os.path.samestat(os.fstat(folder), path.stat()):
            return folder
    except BaseException:
        os.close(folder)
        raise
    os.close(folder)
    return None


def write_atomically(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write the bytes of `pieces`, one after the other, to `path`, replacing what is there.

    A temporary file in the same folder gets the bytes and, once they are on the disk, the name.
    Raises ContainerError where that fails; then, as after Ctrl-C, nothing is left behind and
    what was at `path` is untouched.
    """
    temporary = path.parent / f".vqbench-{uuid.uuid4().hex}.tmp"
    try:
        write_through(temporary, pieces, named=path)
        with explained(path):
            temporary.replace(path)
    finally:
        # after the rename nothing has this name any more
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_through(path: Path, pieces: Sequence[bytes | memoryview], *, named: Path) -> None:
    """Write `pieces` to a new file at `path` and wait until they are on the disk.

    Raises ContainerError, which speaks of `named`; then part of the file may be left.
    """
    need = sum(memoryview(piece).nbytes for piece in pieces)
    with explained(named, need=need):
        _check_space(named, path.parent, need)
        with path.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def staged(path: Path, *, need: int = 0) -> Iterator[Path]:
    """Where to write a file or a folder that gets the name `path` once the block has ended.

    It lies in a temporary folder beside `path`. After the block its bytes are put on the disk,
    and then it replaces the file or the folder at `path`. `need` bytes must be free. Raises
    ContainerError where that fails; then, as after Ctrl-C, nothing is left behind and what was at
    `path` is untouched.
    """
    temporary = path.parent / f".vqbench-{uuid.uuid4().hex}.tmp"
    made = temporary / path.name
    try:
        with explained(path, need=need):
            _check_space(path, path.parent, need)
            temporary.mkdir()
            yield made
            _sync_tree(made)
            if path.exists() and (path.is_dir() or made.is_dir()):
                _exchange(made, path)
            else:
                made.replace(path)
    except VqError as error:
        # the reader knows nothing of the temporary name
        raise type(error)(str(error).replace(str(made), str(path))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system can (Linux 3.15, most file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = os.fsencode(one), os.fsencode(other)
    return bool(rename(here, paths[0], here, paths[1], exchange) == 0)


def _exchange(made: Path, path: Path) -> None:
    """Give `made` the name of `path`, where a folder is one of them; what was there goes."""
    if _swapped(made, path):
        return  # what was at `path` is in the temporary folder now, and goes with it
    # in two steps, between which nothing has the name
    # beside the temporary folder, not in it: what is in there is deleted whatever happens
    old = path.parent / f".vqbench-{uuid.uuid4().hex}.old"
    try:
        path.rename(old)
        made.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def _sync_tree(top: Path) -> None:
    paths = [top, *top.rglob("*")] if top.is_dir() else [top]
    for path in paths:
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _check_space(path: Path, folder: Path, need: int) -> None:
    have = shutil.disk_usage(folder).free
    if need > have:
        raise ContainerError(
            f"{path}: needs {need:,} bytes, but its disk has {have:,} left; {_SPACE}"
        )


@contextlib.contextmanager
def explained(path: Path, *, need: int = 0) -> Iterator[None]:
    """What the system raises where `path` is written, as a ContainerError with a fix."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the disk, or choose another one")
        size = f", {need:,} bytes" if need else ""
        reason = error.strerror or error
        raise ContainerError(f"{path}: can't be written ({reason}{size}); {hint}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut, where the file system can do that."""
    # some network ones refuse; the files themselves are whole already
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
