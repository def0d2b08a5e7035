"""Opening containers, of one file or of several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vqkernels.container.base import Container
from vqkernels.container.index import INDEX
from vqkernels.container.manifest import ContainerInfo
from vqkernels.container.read import open_file
from vqkernels.container.shards import open_shards
from vqkernels.errors import ContainerError
from vqkernels.tensor import QuantizedTensor

__all__ = ["describe", "load", "open_container"]


def open_container(path: str | os.PathLike[str]) -> Container:
    """The container at `path`: a file, the folder of a set of shards, or the set's index.

    Files are mapped and headers checked, no tensor data is read yet. A matrix is read, checked and
    copied out each time it is looked up. Raises ContainerError for what is damaged, truncated, of
    a newer version or no container, and for a set whose index and shards disagree; a lookup
    raises ContainerError for damaged data, and TensorError for parts that don't fit their format.
    """
    container = _opened(Path(path))
    if "shard" in container.info.extra:
        raise ContainerError(
            f"{path}: is one shard of several; open {INDEX} beside it, or its folder"
        )
    return container


def load(
    path: str | os.PathLike[str], *, names: Iterable[str] | None = None, decoded: bool = False
) -> dict[str, QuantizedTensor]:
    """The matrices of the container at `path` (those in `names` only), checked, on the CPU.

    `decoded` also checks the dequantised values, which takes as long as dequantising does.
    Errors as for `open_container` and its lookups, and ContainerError for an unknown name.
    """
    source = open_container(path)
    wanted = list(source) if names is None else list(dict.fromkeys(names))
    if absent := [name for name in wanted if name not in source]:
        raise ContainerError(f"{path}: no tensor {absent[0]!r}; the file holds {', '.join(source)}")
    return {name: source.verify(name) if decoded else source[name] for name in wanted}


def describe(path: str | os.PathLike[str]) -> ContainerInfo:
    """What the container, or the single shard, at `path` holds: no tensor data is read.

    Raises ContainerError as `open_container` does.
    """
    return _opened(Path(path)).info


def _opened(path: Path) -> Container:
    if path.is_dir() and not (path / INDEX).exists():
        raise ContainerError(
            f"{path}: is a folder without {INDEX}; give a container file, or a set's folder"
        )
    sharded = path.is_dir() or path.name.endswith(".json")
    return open_shards(path) if sharded else open_file(path)
