"""Reading container files, one matrix at a time.

Reading goes through the safetensors library, which bounds every offset by the file's size; then
shapes, checksums, ranges and NaN are checked, in that order, before a tensor is handed out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqkernels.container.base import Container
from vqkernels.container.checksums import decoded_sha256, sha256
from vqkernels.container.codes import check_expansion, check_usage, restore_codes
from vqkernels.container.layout import find_pads
from vqkernels.container.manifest import ContainerInfo, TensorInfo, from_header, located
from vqkernels.container.stored import DTYPES, stored_table
from vqkernels.errors import ContainerError, VqError
from vqkernels.parts import check_shape
from vqkernels.tensor import QuantizedTensor

__all__ = ["FileContainer", "open_file"]

_AGAIN = "copy it again from its source, or quantise again"


class FileContainer(Container):
    """The matrices of one file, mapped into memory.

    A file that is replaced meanwhile (as `save` does) stays readable here as it was.
    """

    def __init__(self, path: Path, file: Any, info: ContainerInfo, pads: Mapping[str, str]) -> None:
        super().__init__(path, info)
        self._file, self._pads = file, pads

    def __getitem__(self, name: str) -> QuantizedTensor:
        info = self._outlines[name]
        with located(self.path), _explained(self.path):
            return self._restored(info, self._parts(info))

    def verify(self, name: str) -> QuantizedTensor:
        """Matrix `name`, its usage and its dequantised values checked too."""
        info, where = self._outlines[name], f"tensor {name!r}"
        with located(self.path), _explained(self.path):
            parts = self._parts(info)
            tensor = self._restored(info, parts)
            check_usage(parts, tensor.parts["codes"], where)
            if decoded_sha256(tensor, where) != info.decoded_checksum:
                raise ContainerError(
                    f"{where}: the dequantised values don't match their checksum; "
                    f"the writer and this build decode differently: report it with both versions"
                )
        return tensor

    def usage(self, name: str) -> dict[int, Tensor]:
        """How often each entry of a stage is used, for stages that store it."""
        info = self._outlines[name]
        stages = range(len(info.spec.stages))
        with located(self.path), _explained(self.path):
            found = {
                s: self._part(info, part)
                for s in stages
                if (part := f"usage_{s}") in info.checksums
            }
        return {stage: counts.long() for stage, counts in found.items()}

    def _parts(self, info: TensorInfo) -> dict[str, Tensor]:
        return {part: self._part(info, part) for part in info.part_bytes}

    def _part(self, info: TensorInfo, part: str) -> Tensor:
        """A stored part, its checksum checked, and the zeros behind it.

        A copy: what is checked has to be what is used, and a mapped file may be changed under us,
        or truncated, which ends a process that touches it then.
        """
        key, where = f"{info.name}/{part}", f"tensor {info.name!r}"
        value: Tensor = self._file.get_tensor(key).clone()
        if sha256(value) != info.checksums[part]:
            raise ContainerError(f"{where}: {part} doesn't match its checksum; {_AGAIN}")
        if (pad := self._pads.get(key)) and bool(self._file.get_tensor(pad).any()):
            raise ContainerError(
                f"{where}: {pad!r}, behind {part}, holds more than zeros; {_AGAIN}"
            )
        return value

    def _restored(self, info: TensorInfo, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        where = f"tensor {info.name!r}"
        codes = restore_codes(parts, info, where)
        found = {part: codes if part == "codes" else parts[part] for part in info.table()}
        tensor = QuantizedTensor(info.spec, info.n, info.k, found)
        tensor.validate(where)
        return tensor


def open_file(path: Path) -> FileContainer:
    """The container file at `path`, of several or by itself; see `open_container`."""
    with located(path), _explained(path):
        _check_file(path)
        size = path.stat().st_size
        file = safe_open(path, framework="pt")
        return FileContainer(path, file, *_checked_info(file, size))


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


def _checked_info(file: Any, file_size: int) -> tuple[ContainerInfo, dict[str, str]]:
    """The description, once every tensor in the header has the shape and dtype it implies; pads.

    Shapes in the header are bounded by the file's size, so those of the description are too.
    """
    info = from_header(file.metadata())
    present = set(file.keys())
    described = []
    for tensor in info.tensors:
        with _about(f"tensor {tensor.name!r}"):
            sizes = _checked_parts(file, tensor, present)
            check_expansion(tensor, sizes)
        described.append(dataclasses.replace(tensor, part_bytes=sizes))
    parts = {
        f"{tensor.name}/{part}": size
        for tensor in described
        for part, size in tensor.part_bytes.items()
    }
    pads = {}
    if info.version > 1:
        with _about():
            pads = find_pads(file, parts, file_size)
    elif extra := sorted(present - set(parts)):
        raise ContainerError(f"{extra[0]!r} belongs to no tensor of the description; {_AGAIN}")
    return dataclasses.replace(info, tensors=tuple(described)), pads


def _checked_parts(file: Any, tensor: TensorInfo, present: Set[str]) -> dict[str, int]:
    """Bytes of each part. Raises ContainerError unless the header says of them what it should."""
    check_shape(tensor.spec, tensor.n, tensor.k)
    table = stored_table(tensor)
    if set(tensor.checksums) != set(table):
        raise ContainerError("its parts don't go with its format")
    if absent := sorted(
        set(table) - {part for part in table if f"{tensor.name}/{part}" in present}
    ):
        raise ContainerError(f"'{tensor.name}/{absent[0]}' is missing")
    sizes = {}
    for part, entry in table.items():
        found = file.get_slice(f"{tensor.name}/{part}")
        shape, dtype = found.get_shape(), str(found.get_dtype())
        kind = next((kind for kind, name in DTYPES.items() if name == dtype), torch.bool)
        if not entry.fits(shape, kind):
            raise ContainerError(f"{part} is {dtype} {list(shape)}, but the format needs {entry}")
        sizes[part] = math.prod(shape) * kind.itemsize
    return sizes


@contextlib.contextmanager
def _about(where: str = "") -> Iterator[None]:
    """Errors inside as ContainerErrors with `where` in front and a fix behind."""
    try:
        yield
    except VqError as error:
        raise ContainerError(f"{where}{where and ': '}{error}; {_AGAIN}") from error
