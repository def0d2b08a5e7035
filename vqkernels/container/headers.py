"""What a file's header says of its tensors, held to the description and to the format."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Set
from typing import Any

import torch

from vqkernels.container.codes import check_expansion
from vqkernels.container.layout import Place, locate
from vqkernels.container.manifest import ContainerInfo, TensorInfo, from_header
from vqkernels.container.stored import DTYPES, stored_table
from vqkernels.errors import ContainerError, VqError
from vqkernels.parts import check_shape

__all__ = ["AGAIN", "StoredTensor", "checked_header"]

AGAIN = "copy it again from its source, or quantise again"

_KINDS = {name: dtype for dtype, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A stored part: where it lies, and as what."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: Place


def checked_header(file: Any, file_size: int) -> tuple[ContainerInfo, dict[str, StoredTensor]]:
    """The description and the stored parts by key, of a file that the safetensors library opened.

    Every part has the shape and dtype that the description implies, and nothing else is there.
    The library bounds shapes by the file's size, so those of the description are bounded too.
    Raises ContainerError, without the file's name.
    """
    info = from_header(file.metadata())
    present = set(file.keys())
    described, found = [], dict[str, tuple[tuple[int, ...], torch.dtype]]()
    for tensor in info.tensors:
        with _about(f"tensor {tensor.name!r}: "):
            parts = _checked_parts(file, tensor, present)
            sizes = {part: math.prod(s) * dtype.itemsize for part, (s, dtype) in parts.items()}
            check_expansion(tensor, sizes)
        described.append(dataclasses.replace(tensor, part_bytes=sizes))
        found |= {f"{tensor.name}/{part}": entry for part, entry in parts.items()}
    with _about():
        sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in found.items()}
        places = locate(file, sizes, file_size, padded=info.version > 1)
    stored = {key: StoredTensor(*entry, places[key]) for key, entry in found.items()}
    return dataclasses.replace(info, tensors=tuple(described)), stored


def _checked_parts(
    file: Any, tensor: TensorInfo, present: Set[str]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part. Raises ContainerError unless they are what they should be."""
    check_shape(tensor.spec, tensor.n, tensor.k)
    table = stored_table(tensor)
    if set(tensor.checksums) != set(table):
        raise ContainerError("its parts don't go with its format")
    found = {}
    for part in sorted(table):
        if (key := f"{tensor.name}/{part}") not in present:
            raise ContainerError(f"{key!r} is missing")
        header = file.get_slice(key)
        shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
        if dtype not in _KINDS or not table[part].fits(shape, _KINDS[dtype]):
            raise ContainerError(
                f"{part} is {dtype} {list(shape)}, but the format needs {table[part]}"
            )
        found[part] = (shape, _KINDS[dtype])
    return {part: found[part] for part in table}


@contextlib.contextmanager
def _about(where: str = "") -> Iterator[None]:
    """Errors inside as ContainerErrors with `where` in front and a fix behind."""
    try:
        yield
    except VqError as error:
        raise ContainerError(f"{where}{error}; {AGAIN}") from error
