"""Others' checkpoint formats: quantised matrices read from their folders and written back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vqkernels.container import open_container
from vqkernels.errors import ContainerError
from vqkernels.formats.aqlm import AqlmSource
from vqkernels.formats.checkpoint import CONFIG, Checkpoint
from vqkernels.formats.vptq import VptqSource
from vqkernels.source import TensorSource

__all__ = ["Checkpoint", "open_source"]

_BY_METHOD: dict[str, Callable[[Checkpoint], TensorSource]] = {
    "aqlm": AqlmSource,
    "vptq": VptqSource,
}


def open_source(path: str | os.PathLike[str]) -> TensorSource:
    """The quantised matrices at `path`: a container, or a checkpoint's folder (with config.json).

    Raises ContainerError where it is neither, or a checkpoint of another method.
    """
    path = Path(path)
    if not (path / CONFIG).exists():
        return open_container(path)
    checkpoint = Checkpoint(path)
    if checkpoint.method not in _BY_METHOD:
        raise ContainerError(
            f"{path / CONFIG}: quant_method {checkpoint.method!r} is not one that vqbench reads "
            f"({', '.join(_BY_METHOD)}); convert it with its own tools first"
        )
    return _BY_METHOD[checkpoint.method](checkpoint)
