"""Reading containers, all of a file or one matrix at a time.

Reading goes through the safetensors library, which bounds every offset by the file's size; then
shapes, checksums, ranges and NaN are checked, in that order, before a tensor is handed out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vqkernels.container.checksums import decoded_sha256, sha256
from vqkernels.container.manifest import ContainerInfo, TensorInfo, from_header, located
from vqkernels.container.stored import DTYPES, stored_table, unpack
from vqkernels.errors import ContainerError, VqError
from vqkernels.parts import Part, check_shape
from vqkernels.source import TensorSource
from vqkernels.tensor import QuantizedTensor

__all__ = ["Container", "describe", "load", "open_container"]

_AGAIN = "copy it again from its source, or quantise again"


class Container(TensorSource):
    """The matrices of one file, mapped into memory; see `open_container`.

    info: what the header says. The mapping ends with the object. A file that is replaced
    meanwhile (as `save` does) stays readable here as it was.
    """

    def __init__(self, path: Path, file: Any, info: ContainerInfo) -> None:
        self.path, self.info = path, info
        self._file = file
        self._outlines = {tensor.name: tensor for tensor in info.tensors}

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._read(self._outlines[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._outlines)

    def __len__(self) -> int:
        return len(self._outlines)

    def __contains__(self, name: object) -> bool:
        # the Mapping's own would read the matrix
        return name in self._outlines

    def outline(self, name: str) -> TensorInfo:
        """What the header says of matrix `name`."""
        return self._outlines[name]

    def verify(self, name: str) -> QuantizedTensor:
        """Matrix `name`, its dequantised values checked too: as long as dequantising takes.

        Raises ContainerError and TensorError as a lookup does, and KeyError.
        """
        info = self._outlines[name]
        tensor = self._read(info)
        with located(self.path):
            where = f"tensor {name!r}"
            if decoded_sha256(tensor, where) != info.decoded_checksum:
                raise ContainerError(
                    f"{where}: the dequantised values don't match their checksum; "
                    f"the writer and this build decode differently: report it with both versions"
                )
        return tensor

    def _read(self, info: TensorInfo) -> QuantizedTensor:
        where = f"tensor {info.name!r}"
        with located(self.path), _explained(self.path):
            parts = {}
            for part in info.table():
                # a copy: what is checked here has to be what is used, and a mapped file may be
                # changed under us, or truncated, which ends a process that touches it later
                parts[part] = self._file.get_tensor(f"{info.name}/{part}").clone()
                if sha256(parts[part]) != info.checksums[part]:
                    raise ContainerError(f"{where}: {part} doesn't match its checksum; {_AGAIN}")
            parts["codes"] = unpack(parts["codes"], info.spec, info.table()["codes"], where)
            tensor = QuantizedTensor(info.spec, info.n, info.k, parts)
            tensor.validate(where)
            return tensor


def open_container(path: str | os.PathLike[str]) -> Container:
    """The container at `path`: mapped, its header checked, no tensor data read yet.

    A matrix is read, checked and copied out each time it is looked up. Raises ContainerError for
    a file that is damaged, truncated, of a newer version or not a container; a lookup raises
    ContainerError for damaged data, and TensorError for parts that don't fit their format.
    """
    path = Path(path)
    with located(path), _explained(path):
        _check_file(path)
        file = safe_open(path, framework="pt")
        return Container(path, file, _checked_info(file))


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
    """What the container at `path` holds, from its header alone: no tensor data is read.

    Raises ContainerError as `open_container` does.
    """
    return open_container(path).info


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system or the safetensors library raises, as a ContainerError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ContainerError(f"can't be read ({reason}); check the path and its mode") from error
    except SafetensorError as error:
        raise ContainerError(f"{_kind(path)} ({_one_line(error)}); {_AGAIN}") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ContainerError("there is no such file; check the path")
    if not path.is_file():
        raise ContainerError("is not a file; give the path of a container (.safetensors)")


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty"
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return "is a zip or pickle file (torch.save?), which vqbench never loads"
    return "is truncated, damaged or no container"


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _checked_info(file: Any) -> ContainerInfo:
    """The file's description, once every tensor in its header has the shape and dtype it implies.

    Shapes in the header are bounded by the file's size, so those of the description are too.
    """
    info = from_header(file.metadata())
    present, expected = set(file.keys()), set()
    described = []
    for tensor in info.tensors:
        where = f"tensor {tensor.name!r}"
        try:
            check_shape(tensor.spec, tensor.n, tensor.k)
        except VqError as error:
            raise ContainerError(f"{where}: {error}; {_AGAIN}") from error
        table = stored_table(tensor)
        if set(tensor.checksums) != set(table):
            raise ContainerError(f"{where}: its parts don't go with its format; {_AGAIN}")
        keys = {f"{tensor.name}/{part}": entry for part, entry in table.items()}
        if absent := sorted(set(keys) - present):
            raise ContainerError(f"{where}: {absent[0]!r} is missing; {_AGAIN}")
        for key, entry in keys.items():
            _check_header(file, key, entry, where)
        expected |= set(keys)
        size = sum(entry.numel * entry.dtype.itemsize for entry in table.values())
        described.append(dataclasses.replace(tensor, stored_bytes=size))
    if extra := sorted(present - expected):
        raise ContainerError(f"{extra[0]!r} belongs to no tensor of the description; {_AGAIN}")
    return dataclasses.replace(info, tensors=tuple(described))


def _check_header(file: Any, key: str, entry: Part, where: str) -> None:
    found = file.get_slice(key)
    shape, dtype = tuple(found.get_shape()), str(found.get_dtype())
    if shape != entry.shape or dtype != DTYPES[entry.dtype]:
        raise ContainerError(
            f"{where}: {key.rpartition('/')[2]} is {dtype} {list(shape)}, but the format needs "
            f"{DTYPES[entry.dtype]} {list(entry.shape)}; {_AGAIN}"
        )
