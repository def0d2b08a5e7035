"""Containers that were written one by one, as one: nothing is coded or computed anew."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vqkernels.atomic import write_atomically
from vqkernels.container.manifest import located
from vqkernels.container.origin import checked_provenance
from vqkernels.container.read import open_file
from vqkernels.container.shards import write_shards
from vqkernels.container.write import Prepared, serialise

__all__ = ["join", "join_shards"]


def join(
    path: str | os.PathLike[str],
    files: Sequence[Path],
    *,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write the matrices of the container `files`, in their order, to `path`.

    The bytes are those that `save` writes of the same matrices, and the files are mapped, so that
    none of them need fit in memory. Only who wrote them may ask for it: they are not checked
    again, and must not be changed meanwhile. Raises ContainerError where `path` can't be written,
    and for files that are no containers.
    """
    path = Path(path)
    with located(path):
        pieces = serialise(list(_mapped(files)), checked_provenance(provenance))
    write_atomically(path, pieces)


def join_shards(
    folder: str | os.PathLike[str],
    files: Sequence[Path],
    *,
    shard_bytes: int,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write the matrices of `files` as `join` does, but as `save_shards` does."""
    write_shards(Path(folder), _mapped(files), shard_bytes=shard_bytes, provenance=provenance)


def _mapped(files: Sequence[Path]) -> Iterator[Prepared]:
    for path in files:
        source = open_file(path)
        for name in source:
            yield source.mapped(name)
