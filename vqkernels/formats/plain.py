"""Quantised matrices as plain binary files, a file a part: for programs without any library.

A folder holds `layers.json`, the description (`description` says what is in it), and for each
layer `<layer>.idx.bin`, `<layer>.codebook.bin` (`.codebook_0.bin`, `.codebook_1.bin`, ... where
there are stages) and `<layer>.<part>.bin` for each other part. A file is the bare elements of a
part as `part_table` gives it, little-endian, the last axis running fastest: codes are not packed
but a byte each, or two where a codebook has more than 256 entries, at `[row][column][stage]`.

`<layer>` is the layer's name with every byte of its UTF-8 text but a-z, 0-9, `_`, `-` and dots
(the first one apart) as %xx, which URL decoders undo: names that differ by case alone stay apart
where the file system doesn't tell case. Over 150 bytes, a name is cut and ends in ~ and 32 digits
of its SHA-256; `layers.json` has it whole. Readers go by the file names in `layers.json`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

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

__all__ = ["INDEX", "PlainSource", "save_plain"]

INDEX = "layers.json"
KIND = "vqbench-plain"
_KEPT = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-.")
_MAX_STEM = 150  # file systems take 255 bytes; a part's name and the suffix follow


def save_plain(
    folder: str | os.PathLike[str],
    source: Mapping[str, QuantizedTensor],
    *,
    provenance: Mapping[str, str] | None = None,
    made: Mapping[str, Made] | None = None,
) -> None:
    """Write the matrices of `source` as files in a new `folder`, whole or not at all.

    One matrix at a time is in memory. `provenance` and `made` are as for a container. An earlier
    set in `folder` is replaced as a whole; a folder that holds anything else is left alone. Raises
    TensorError for an invalid tensor, and ContainerError where the files can't be written.
    """
    folder = Path(folder)
    with located(folder):
        _check_free(folder)
        writer = Writer(KIND, source, provenance, made)
    with staged(folder, need=writer.need) as staging, located(folder):
        staging.mkdir()
        for name in source:
            tensor = source[name]
            writer.begin(name, tensor)
            for part, value in stored_parts(name, tensor):
                file = file_name(name, part, len(tensor.spec.stages))
                writer.add(part, value, file)
                (staging / file).write_bytes(raw_bytes(value))
        (staging / INDEX).write_bytes(writer.text())


class PlainSource(DescribedSource):
    """The matrices of a folder that `save_plain` wrote, or of its `layers.json`.

    Raises ContainerError for a set that is damaged or incomplete, and for file names that lead
    out of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self._folder = path if path.is_dir() else path.parent
        index = self._folder / INDEX
        with located(index), readable():
            super().__init__(index, parse(_text(index), KIND))
            for tensor in self._tensors.values():
                for part, entry in tensor.table().items():
                    where = f"tensor {tensor.name!r}: {part}"
                    _check_file(self._folder, tensor.parts[part].file, entry, where)

    def _read(self, tensor: DescribedTensor, part: str, entry: Part) -> Tensor:
        # a file that has become a link since it was checked may lead anywhere
        descriptor = os.open(self._folder / tensor.parts[part].file, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            return read_exactly(file, entry)


def file_name(layer: str, part: str, stages: int) -> str:
    """The file of a layer's part; no two parts of two layers share one."""
    kind = {"codes": "idx", "codebook_0": "codebook" if stages == 1 else part}.get(part, part)
    text = layer.encode()
    stem = "".join(
        chr(byte) if byte in _KEPT and (at or byte != ord(".")) else f"%{byte:02x}"
        for at, byte in enumerate(text)
    )
    if len(stem) > _MAX_STEM:
        stem = f"{stem[: _MAX_STEM - 33]}~{hashlib.sha256(text).hexdigest()[:32]}"
    return f"{stem}.{kind}.bin"


def _check_free(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ContainerError("is a file; name a folder")
    names = {path.name for path in folder.iterdir()}
    others = sorted(name for name in names if name != INDEX and not name.endswith(".bin"))
    if names and (INDEX not in names or others):
        raise ContainerError(
            f"holds {(others or sorted(names))[0]!r}, which is of no earlier set; "
            f"name a folder of its own"
        )


def _text(index: Path) -> bytes:
    if not index.is_file():
        raise ContainerError("there is no such file: no set of plain files, or half of one")
    size = index.stat().st_size
    if size > MAX_TEXT:
        raise ContainerError(f"a description of {size:,} bytes; {AGAIN}")
    return index.read_bytes()


def _check_file(folder: Path, name: str, entry: Part, where: str) -> None:
    # a path would lead out of the folder; a pipe would never end
    if Path(name).name != name or not name.isprintable() or not name.endswith(".bin"):
        raise ContainerError(f"{where}: {name!r} is no file name; {AGAIN}")
    path = folder / name
    if not path.exists():
        raise ContainerError(f"{where}: {name!r} is missing; {AGAIN}")
    found, need = path.lstat(), entry.numel * entry.dtype.itemsize
    if not stat.S_ISREG(found.st_mode):
        raise ContainerError(f"{where}: {name!r} is a link or no file; put the file itself there")
    if found.st_size != need:
        raise ContainerError(
            f"{where}: {name!r} has {found.st_size:,} bytes, but the format needs {need:,}; {AGAIN}"
        )
