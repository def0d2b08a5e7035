"""What of a model isn't quantised, by name: embeddings, norms, lm_head, biases."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from vqkernels.container import open_container
from vqkernels.errors import ContainerError
from vqkernels.formats import CheckpointSource, open_source
from vqkernels.formats.tensor_files import INDEX, opened

__all__ = ["DENSE_CHECKSUM", "DENSE_FILE", "DenseFile", "open_dense"]

DENSE_FILE = "dense.safetensors"
"""Beside the containers of an imported folder: what its checkpoint did not quantise."""

DENSE_CHECKSUM = "dense_sha256"
"""In the containers' provenance: SHA-256 of that file."""


class DenseFile(Mapping[str, Tensor]):
    """The tensors of the safetensors file at `path`, each read when it is looked up.

    Raises ContainerError, which names the file, where it is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with opened(self._path) as file:
            self._keys: list[str] = list(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        # mapped for as long as it takes to copy: pages of a mapping count as memory
        with opened(self._path) as file:
            value: Tensor = file.get_tensor(key).clone()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_dense(folder: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The dense tensors of a checkpoint, or of an imported folder, each read when it is looked up.

    An imported folder's are checked against their checksum first, which reads all of them once.
    Raises ContainerError for a folder without any, or damaged ones.
    """
    path = Path(folder)
    if (path / DENSE_FILE).is_file():
        _check(path)
        return DenseFile(path / DENSE_FILE)
    source = open_source(path)
    if isinstance(source, CheckpointSource):
        return source.checkpoint.tensors(source.dense_keys())
    raise ContainerError(
        f"{path}: holds no {DENSE_FILE}, and is no checkpoint; give the folder that "
        f"`vqbench import` made, or the checkpoint's own"
    )


def _check(folder: Path) -> None:
    """Raise ContainerError where the dense file isn't the one that was imported."""
    if not (folder / INDEX).is_file():
        return
    wanted = open_container(folder).info.provenance.get(DENSE_CHECKSUM)
    if wanted is None:
        return
    with (folder / DENSE_FILE).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ContainerError(
            f"{folder / DENSE_FILE}: doesn't match its checksum, which is in {INDEX}; "
            f"import the checkpoint again"
        )
