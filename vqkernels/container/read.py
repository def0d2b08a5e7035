"""Reading container files, one matrix at a time.

The header is read by the safetensors library, which bounds every offset by the file's size; then
shapes, checksums, ranges and NaN are checked, in that order, before a tensor is handed out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqkernels.container.base import Container
from vqkernels.container.checksums import decoded_sha256, sha256
from vqkernels.container.codes import check_usage, restore_codes
from vqkernels.container.headers import AGAIN, StoredTensor, checked_header
from vqkernels.container.manifest import ContainerInfo, TensorInfo, located
from vqkernels.container.mapped import MappedFile
from vqkernels.container.write import Prepared
from vqkernels.errors import ContainerError
from vqkernels.tensor import QuantizedTensor

__all__ = ["FileContainer", "open_file"]


class FileContainer(Container):
    """The matrices of one file, mapped into memory.

    A file that is replaced meanwhile (as `save` does) stays readable here as it was.
    """

    def __init__(
        self, path: Path, file: MappedFile, info: ContainerInfo, stored: Mapping[str, StoredTensor]
    ) -> None:
        super().__init__(path, info)
        self._file, self._stored = file, stored

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

    def mapped(self, name: str) -> Prepared:
        """Matrix `name` as it lies in the file, to be written into another: nothing is read here.

        Its parts are mapped, and end the process that reads them if the file is cut meanwhile: so
        this is for files that nobody else writes to.
        """
        info, size = self._outlines[name], len(self._file)
        content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        parts = {}
        for part in info.part_bytes:
            stored = self._stored[f"{name}/{part}"]
            start = stored.place.offset
            value = content[start : start + stored.place.nbytes]
            parts[part] = value.view(stored.dtype).reshape(stored.shape)
        return Prepared(info, parts)

    def _parts(self, info: TensorInfo) -> dict[str, Tensor]:
        return {part: self._part(info, part) for part in info.part_bytes}

    def _part(self, info: TensorInfo, part: str) -> Tensor:
        """A copy of a stored part, its checksum checked, and the zeros behind it."""
        stored, where = self._stored[f"{info.name}/{part}"], f"tensor {info.name!r}"
        place = stored.place
        value = self._file.tensor(place.offset, stored.shape, stored.dtype)
        if sha256(value) != info.checksums[part]:
            raise ContainerError(f"{where}: {part} doesn't match its checksum; {AGAIN}")
        if place.pad:
            behind = self._file.tensor(place.offset + place.nbytes, [place.pad_nbytes], torch.uint8)
            if bool(behind.any()):
                raise ContainerError(
                    f"{where}: {place.pad!r}, behind {part}, holds more than zeros; {AGAIN}"
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
        with path.open("rb") as opened:
            before = os.fstat(opened.fileno())
            header = safe_open(path, framework="pt")
            after = path.stat()
            if not os.path.samestat(before, after) or before.st_size != after.st_size:
                raise ContainerError("was changed while it was opened; open it again")
            file = MappedFile(opened, before.st_size)
        return FileContainer(path, file, *checked_header(header, len(file)))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system or the safetensors library raises, as a ContainerError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ContainerError(f"can't be read ({reason}); check the path and its mode") from error
    except SafetensorError as error:
        raise ContainerError(f"{_kind(path)} ({_one_line(error)}); {AGAIN}") from error


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
