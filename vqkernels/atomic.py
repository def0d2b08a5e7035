"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from vqkernels.errors import ContainerError

__all__ = ["explained", "locked", "sync_folder", "write_atomically", "write_through"]

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
def locked(path: Path) -> Iterator[None]:
    """Hold off others who would lock the folder of `path`, while `path` is read and written anew.

    The folder, since `path` itself is replaced. Raises ContainerError where there is none.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "choose another folder")
        raise ContainerError(f"{path}: can't be locked: {error.strerror}; {hint}") from error
    try:
        with contextlib.suppress(OSError):  # a network's file system that locks no folders
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # gives the lock back


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
    with explained(named, need):
        have = shutil.disk_usage(path.parent).free
        if need > have:
            raise ContainerError(
                f"{named}: needs {need:,} bytes, but its disk has {have:,} left; {_SPACE}"
            )
        with path.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def explained(path: Path, need: int = 0) -> Iterator[None]:
    """What the system raises where `path` is written, as a ContainerError with a fix."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the disk, or choose another one")
        reason = error.strerror or str(error)
        raise ContainerError(
            f"{path}: can't be written ({reason}{f', {need:,} bytes' if need else ''}); {hint}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut, where the file system can do that."""
    # some network ones refuse; files themselves are whole already
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
