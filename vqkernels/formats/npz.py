"""Quantised matrices as numpy arrays: an .npz file that `numpy.load` reads without pickle.

Part `p` of matrix `name` is the array `<name>/<p>`, as `part_table` gives it: codes `[rows,
columns, stages]` of uint8 or uint16, one number each. bfloat16, which numpy lacks, lies there as
its bits in uint16. `__vqbench__`, an array of bytes, is the description's JSON text: what each
matrix is, the dtypes as they are meant, and checksums. Nothing is compressed, so that what an
array claims to take can't exceed the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.atomic import staged
from vqkernels.container.checksums import raw_bytes
from vqkernels.container.manifest import located
from vqkernels.container.origin import Made
from vqkernels.container.signed import MAX_TEXT
from vqkernels.errors import ContainerError
from vqkernels.formats.description import (
    AGAIN,
    DescribedSource,
    DescribedTensor,
    Writer,
    parse,
    read_exactly,
    readable,
    stored_parts,
)
from vqkernels.parts import Part
from vqkernels.tensor import QuantizedTensor

__all__ = ["NpzSource", "save_npz"]

KIND = "vqbench-npz"
# of the zipfile module, for bytes that are no zip file
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error)
_KEY = "__vqbench__"
_HEAD = 10  # bytes of an .npy file before its header's text: magic, version 1.0, the text's length
_MAX_HEADER = 1 << 10  # numpy's take 128, or some more for shapes of many digits


def save_npz(
    path: str | os.PathLike[str],
    source: Mapping[str, QuantizedTensor],
    *,
    provenance: Mapping[str, str] | None = None,
    made: Mapping[str, Made] | None = None,
) -> None:
    """Write the matrices of `source` to `path`, whole or not at all; a file there is replaced.

    One matrix at a time is in memory. `provenance` and `made` are as for a container. Equal
    arguments give equal bytes. Raises TensorError for an invalid tensor, and ContainerError where
    the file can't be written.
    """
    path = Path(path)
    with located(path):
        writer = Writer(KIND, source, provenance, made)
    with (
        staged(path, need=writer.need) as staging,
        zipfile.ZipFile(staging, "x") as archive,
        located(path),
    ):
        for name in source:
            tensor = source[name]
            writer.begin(name, tensor)
            for part, value in stored_parts(name, tensor):
                writer.add(part, value)
                _store(archive, f"{name}/{part}", value)
        text = bytearray(writer.text())
        _store(archive, _KEY, torch.frombuffer(text, dtype=torch.uint8))


class NpzSource(DescribedSource):
    """The matrices of an .npz file that `save_npz` wrote; the file stays open.

    Raises ContainerError for a file that is damaged, truncated, compressed or something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        with located(path), readable(), _unzipping():
            if path.exists() and not path.is_file():
                raise ContainerError("is not a file; give the path of an .npz file")
            self._archive = zipfile.ZipFile(path)
            size = path.stat().st_size
            members = {info.filename: info for info in self._archive.infolist()}
            if len(members) != len(self._archive.infolist()):
                raise ContainerError(f"two arrays have the same name; {AGAIN}")
            for info in members.values():
                _check_member(info, size)
            super().__init__(path, parse(_text(self._archive, members), KIND))
            _check_members(self._tensors.values(), members)

    def _read(self, tensor: DescribedTensor, part: str, entry: Part) -> Tensor:
        with _unzipping(), self._archive.open(f"{tensor.name}/{part}.npy") as file:
            return _array(file, entry)


def _store(archive: zipfile.ZipFile, key: str, value: Tensor) -> None:
    # a fixed date, 1980, for the same bytes each time
    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as file:
        file.write(_header(value.dtype, value.shape))
        file.write(raw_bytes(value))


def _header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What precedes the data in an .npy file, as numpy writes it."""
    name = "uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    head: dict[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(name).newbyteorder("<")),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(text, head)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------
# reading


@contextlib.contextmanager
def _unzipping() -> Iterator[None]:
    """What zipfile raises, as a ContainerError."""
    try:
        yield
    except _ZIP_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise ContainerError(
            f"is truncated, damaged or no .npz file ({reason}); {AGAIN}"
        ) from error


def _check_member(info: zipfile.ZipInfo, size: int) -> None:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ContainerError(f"{info.filename!r} is compressed; save it with numpy.savez")
    if info.file_size != info.compress_size or info.file_size > size:
        raise ContainerError(f"{info.filename!r} claims {info.file_size:,} bytes; {AGAIN}")


def _text(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> bytes:
    info = members.get(f"{_KEY}.npy")
    if info is None:
        raise ContainerError(f"an .npz file without {_KEY!r}; make one with `vqbench convert`")
    if info.file_size > MAX_TEXT + _MAX_HEADER:
        raise ContainerError(f"a description of {info.file_size:,} bytes; {AGAIN}")
    with archive.open(info) as file:
        content = file.read()
    head = _HEAD + int.from_bytes(content[8:_HEAD], "little")
    _check_header(content[:head], torch.uint8, (len(content) - head,))
    return content[head:]


def _check_members(
    tensors: Iterable[DescribedTensor], members: Mapping[str, zipfile.ZipInfo]
) -> None:
    """Raise ContainerError unless the file holds the arrays of `tensors`, of their sizes."""
    expected = {f"{_KEY}.npy"}
    for tensor in tensors:
        where = f"tensor {tensor.name!r}"
        for part, entry in tensor.table().items():
            key = f"{tensor.name}/{part}.npy"
            if key not in members:
                raise ContainerError(f"{where}: {part} is missing; {AGAIN}")
            size = entry.numel * entry.dtype.itemsize
            if not _HEAD < members[key].file_size - size <= _MAX_HEADER:
                raise ContainerError(
                    f"{where}: {part} takes {members[key].file_size:,} bytes, but the format "
                    f"needs {size:,} and a header; {AGAIN}"
                )
            expected.add(key)
    if extra := sorted(set(members) - expected):
        raise ContainerError(f"{extra[0]!r} belongs to no tensor of the description; {AGAIN}")


def _array(file: IO[bytes], entry: Part) -> Tensor:
    start = file.read(_HEAD)
    _check_header(start + file.read(int.from_bytes(start[8:], "little")), entry.dtype, entry.shape)
    return read_exactly(file, entry)


def _check_header(found: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # numpy's header is a Python dict, always spelled alike but for spaces at its end: compared,
    # nothing of it needs to be evaluated
    expected = _header(dtype, shape)
    if found[_HEAD:].rstrip() != expected[_HEAD:].rstrip():
        said = ascii(found[_HEAD:150].decode("latin-1").strip())
        raise ContainerError(
            f"has the header {said}, but the format needs {dtype} {list(shape)} in C order; {AGAIN}"
        )
