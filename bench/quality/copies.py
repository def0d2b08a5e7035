"""A model's folder with its quantised weights decoded into it: what any other program can load."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from bench.quality.loading import decoded, dense_config
from vqkernels.atomic import explained
from vqkernels.errors import TensorError
from vqkernels.formats import TensorFiles
from vqkernels.formats.write_checkpoint import Group, write_file
from vqkernels.source import outline_of
from vqkernels.tensor import QuantizedTensor

__all__ = ["decoded_folder"]

# Weights in other forms, which would still be the dense ones.
_OTHER_WEIGHTS = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"}
)


@contextlib.contextmanager
def decoded_folder(folder: Path, quantised: Mapping[str, QuantizedTensor]) -> Iterator[Path]:
    """A temporary copy of `folder` whose matrices are the exact decode of `quantised`.

    Files, names, shapes and dtypes are those of `folder`, so each decoded weight is rounded to the
    dtype that it had; weights in other forms than safetensors are left out. It is gone after the
    block. Raises ContainerError for a folder without safetensors or a full disk, TensorError for
    a tensor whose name or shape is not the folder's.
    """
    dense_config(folder)
    tensors = TensorFiles(folder)
    names = _names(tensors, quantised)
    with tempfile.TemporaryDirectory(prefix="vqbench-", ignore_cleanup_errors=True) as top:
        copy = Path(top) / folder.resolve().name
        with explained(copy, need=sum(file.stat().st_size for file in tensors.files)):
            shutil.copytree(folder, copy, ignore=partial(_left_out, folder))
            for file in tensors.files:
                keys = [key for key in tensors.keys() if tensors.file(key) == file]  # noqa: SIM118  # no dict
                groups = [_group(tensors, key, quantised, names.get(key)) for key in keys]
                write_file(copy / file.name, groups)
        yield copy


def _left_out(top: Path, folder: str, found: list[str]) -> set[str]:
    """What isn't copied: the weights, which are written anew, and what is hidden."""
    # a part's own weights, in a folder below, are not what was quantised
    skipped = _OTHER_WEIGHTS | ({".safetensors"} if Path(folder) == top else set())
    return {name for name in found if Path(name).suffix in skipped or name.startswith(".")}


def _names(tensors: TensorFiles, quantised: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """Quantised tensor by the key in the folder's files; shapes and dtypes are checked."""
    names: dict[str, str] = {}
    for name in quantised:
        key = next((key for key in (name, f"{name}.weight") if key in tensors), None)
        if key is None:
            raise TensorError(
                f"{tensors.path}: holds no tensor {name!r}; give the folder of the model that was "
                f"quantised"
            )
        outline, shape = outline_of(quantised, name), list(tensors.shape(key))
        if [outline.n, outline.k] != shape or not tensors.dtype(key).is_floating_point:
            raise TensorError(
                f"{tensors.path}: tensor {name!r} is [{outline.n}, {outline.k}], but the folder's "
                f"is {shape} of {tensors.dtype_name(key)}; it was made for another model"
            )
        names[key] = name
    return names


def _group(
    tensors: TensorFiles,
    key: str,
    quantised: Mapping[str, QuantizedTensor],
    name: str | None,
) -> Group:
    """One tensor of the new file, made when it is written: dense where `name` is None."""
    dtype = tensors.dtype(key)

    def make() -> dict[str, Tensor]:
        return {key: tensors.read(key) if name is None else decoded(quantised[name], dtype)}

    return Group({key: (tensors.shape(key), dtype)}, make)
