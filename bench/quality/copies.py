"""A model's folder with its quantised weights decoded into it: what any other program can load."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.quality.loading import decoded, dense_config
from vqkernels.atomic import explained
from vqkernels.errors import ContainerError, TensorError
from vqkernels.formats.checkpoint import DTYPES, opened
from vqkernels.formats.write_checkpoint import Group, write_file
from vqkernels.source import outline_of
from vqkernels.tensor import QuantizedTensor

__all__ = ["decoded_folder"]

_SAFE = ".safetensors"

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
    files = sorted(path for path in folder.glob(f"*{_SAFE}") if path.is_file())
    shapes = {key: shape for path in files for key, shape in _shapes(path).items()}
    if not shapes:
        raise ContainerError(f"{folder}: holds no {_SAFE} file; give the dense model's folder")
    names = _names(folder, quantised, shapes)
    with tempfile.TemporaryDirectory(prefix="vqbench-", ignore_cleanup_errors=True) as top:
        copy = Path(top) / folder.resolve().name
        with explained(copy, need=sum(path.stat().st_size for path in files)):
            shutil.copytree(folder, copy, ignore=partial(_left_out, folder))
            for path in files:
                write_file(copy / path.name, _groups(path, quantised, names))
        yield copy


def _left_out(top: Path, folder: str, found: list[str]) -> set[str]:
    """What isn't copied: the weights, which are written anew, and what is hidden."""
    # a part's own weights, in a folder below, are not what was quantised
    skipped = _OTHER_WEIGHTS | ({_SAFE} if Path(folder) == top else set())
    return {name for name in found if Path(name).suffix in skipped or name.startswith(".")}


def _shapes(path: Path) -> dict[str, list[int]]:
    with opened(path) as file:
        return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # no dict


def _names(
    folder: Path, quantised: Mapping[str, QuantizedTensor], shapes: Mapping[str, list[int]]
) -> dict[str, str]:
    """Quantised tensor by the key in the folder's files; shapes are checked."""
    names: dict[str, str] = {}
    for name in quantised:
        key = next((key for key in (name, f"{name}.weight") if key in shapes), None)
        if key is None:
            raise TensorError(
                f"{folder}: holds no tensor {name!r}; give the folder of the model that was "
                f"quantised"
            )
        outline = outline_of(quantised, name)
        if [outline.n, outline.k] != shapes[key]:
            raise TensorError(
                f"{folder}: tensor {name!r} is [{outline.n}, {outline.k}], but the folder's is "
                f"{shapes[key]}; it was made for another model"
            )
        names[key] = name
    return names


def _groups(
    path: Path, quantised: Mapping[str, QuantizedTensor], names: Mapping[str, str]
) -> list[Group]:
    """The tensors of the new file, each made when it is written."""
    groups = []
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118  # no dict
            part = file.get_slice(key)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None or (key in names and not dtype.is_floating_point):
                raise ContainerError(
                    f"{path}: tensor {key!r} is of dtype {part.get_dtype()}, which can't be copied "
                    f"with other values; give the dense model's folder"
                )
            make = partial(_value, path, key, quantised, names.get(key), dtype)
            groups.append(Group({key: (tuple(part.get_shape()), dtype)}, make))
    return groups


def _value(
    path: Path,
    key: str,
    quantised: Mapping[str, QuantizedTensor],
    name: str | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    if name is not None:
        return {key: decoded(quantised[name], dtype)}
    with opened(path) as file:
        return {key: file.get_tensor(key).clone()}
