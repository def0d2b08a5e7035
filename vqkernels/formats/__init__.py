"""Quantised matrices in other files than containers: others' checkpoints, arrays, plain files."""

from __future__ import annotations

import os
from pathlib import Path

from vqkernels.container import open_container
from vqkernels.errors import ContainerError
from vqkernels.formats import plain
from vqkernels.formats.aqlm import AqlmSource
from vqkernels.formats.checkpoint import CONFIG, Checkpoint, CheckpointSource
from vqkernels.formats.npz import NpzSource
from vqkernels.formats.plain import PlainSource
from vqkernels.formats.tensor_files import INDEX, TensorFiles, read_json
from vqkernels.formats.vptq import VptqSource
from vqkernels.parallel import MAPPING, open_parallel
from vqkernels.source import TensorSource

__all__ = ["Checkpoint", "CheckpointSource", "TensorFiles", "open_checkpoint", "open_source"]

_BY_METHOD: dict[str, type[AqlmSource] | type[VptqSource]] = {
    "aqlm": AqlmSource,
    "vptq": VptqSource,
}


def open_source(path: str | os.PathLike[str]) -> TensorSource:
    """The quantised matrices at `path`: a container (a file, a folder of shards or of ranks), a
    checkpoint's folder (with config.json), an .npz file or a folder of plain files (layers.json).

    A folder that `vqbench import` made, which has both, is its container. Raises ContainerError
    where it is none of them, or a checkpoint of another method.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return NpzSource(path)
    if path.name == plain.INDEX or (path / plain.INDEX).exists():
        return PlainSource(path)
    if path.name == MAPPING or (path / MAPPING).exists():
        return open_parallel(path)
    if (path / CONFIG).exists() and not _has_container(path):
        return open_checkpoint(path)
    return open_container(path)


def open_checkpoint(path: str | os.PathLike[str], *, skip_bad: bool = False) -> CheckpointSource:
    """The quantised modules of the checkpoint in folder `path`; `skip_bad` as for its source.

    Raises ContainerError for a checkpoint of another method, and for one that was imported.
    """
    if _has_container(Path(path)):
        raise ContainerError(
            f"{path}: is a container already; write it in another layout with `vqbench convert`"
        )
    checkpoint = Checkpoint(path)
    if checkpoint.method not in _BY_METHOD:
        raise ContainerError(
            f"{checkpoint.folder / CONFIG}: quant_method {checkpoint.method!r} is not one that "
            f"vqbench reads ({', '.join(_BY_METHOD)}); convert it with its own tools first"
        )
    return _BY_METHOD[checkpoint.method](checkpoint, skip_bad=skip_bad)


def _has_container(folder: Path) -> bool:
    """Whether the index of shards in `folder` is vqbench's own."""
    index = folder / INDEX
    if not index.is_file():
        return False
    metadata = read_json(index).get("metadata")
    return isinstance(metadata, dict) and "vqbench" in metadata
