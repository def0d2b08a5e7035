"""Tensors of safetensors files: of one file, or of a folder with one or with an index of several.

Nothing in them is trusted: an index and the headers of its shards have to say the same, shards are
files of that folder, and pickles are never loaded. Headers alone are read when they are opened;
a tensor is mapped when it is asked for, copied, and its file is closed again, so that what has
been read doesn't stay in resident memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqkernels.container.index import INDEX
from vqkernels.container.signed import unique_names
from vqkernels.errors import ContainerError

__all__ = ["AGAIN", "DTYPES", "INDEX", "WEIGHTS", "TensorFiles", "opened", "read_json"]

WEIGHTS = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_JSON = 1 << 28  # the index of a model of 10^6 tensors is a third of it

AGAIN = "copy or download it again"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor lies, and what its header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a safetensors file, or of a folder: headers checked, each read by its key.

    path: the file, or the folder with model.safetensors, with any one safetensors file, or with
        model.safetensors.index.json and the shards that it names.

    Raises ContainerError, one line, naming the folder or file, what is wrong and the fix.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ContainerError(
                f"{self.path}: there is no such file or folder; give the path of a .safetensors "
                f"file, or of a model's folder"
            )
        try:
            self._entries = _entries(self.path) if self.path.is_dir() else _headers(self.path)
            self._stamps = {file: _stamp(file) for file in self.files}
        except OSError as error:
            raise _unreadable(self.path, error) from error

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return sorted({entry.file for entry in self._entries.values()})

    def keys(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def file(self, key: str) -> Path:
        """The file that tensor `key` lies in."""
        return self._entry(key).file

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`, from its header."""
        return self._entry(key).shape

    def dtype_name(self, key: str) -> str:
        """What safetensors calls the dtype of tensor `key`: "F32", "BF16", ..."""
        return self._entry(key).dtype

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor `key`, from its header."""
        entry = self._entry(key)
        if entry.dtype not in DTYPES:
            raise ContainerError(
                f"{entry.file}: tensor {key!r} has dtype {entry.dtype}, which vqbench can't read; "
                f"store it as one of {', '.join(DTYPES)}"
            )
        return DTYPES[entry.dtype]

    def read(self, key: str) -> Tensor:
        """A copy of tensor `key`, on the CPU.

        Raises ContainerError as opening does, and where its file was changed since.
        """
        entry = self._entry(key)
        self.dtype(key)
        with opened(entry.file) as file:
            if _stamp(entry.file) != self._stamps[entry.file]:
                raise ContainerError(
                    f"{entry.file}: was changed since it was opened, so tensor {key!r} may be "
                    f"another; open it again"
                )
            # a copy: what is checked is what is used, whatever becomes of the mapped file
            tensor: Tensor = file.get_tensor(key).clone()
            return tensor

    def tensors(self, keys: Iterable[str]) -> Mapping[str, Tensor]:
        """The tensors `keys`, each read when it is looked up."""
        return _Tensors(self, list(keys))

    def _entry(self, key: str) -> _Entry:
        if key not in self._entries:
            raise ContainerError(
                f"{self.path}: tensor {key!r} is missing; the checkpoint is incomplete or its "
                f"config.json is of another model: {AGAIN}"
            )
        return self._entries[key]


class _Tensors(Mapping[str, Tensor]):
    """Some tensors of some files; nothing is kept here."""

    def __init__(self, files: TensorFiles, keys: list[str]) -> None:
        self._files = files
        self._keys = dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._files.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ContainerError for anything else, or a key given twice."""
    try:
        if not path.is_file():
            raise ContainerError(f"{path}: there is no such file; a checkpoint needs it: {AGAIN}")
        if path.stat().st_size > _MAX_JSON:
            raise ContainerError(f"{path}: is over {_MAX_JSON:,} bytes; {AGAIN}")
        content = json.loads(path.read_bytes(), object_pairs_hook=unique_names)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # a bad number or encoding; too deep a nesting
        raise ContainerError(f"{path}: is no valid JSON ({_one_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ContainerError(f"{path}: is no JSON object, but {type(content).__name__}; {AGAIN}")
    return content


def _entries(folder: Path) -> dict[str, _Entry]:
    """Every tensor of the folder, after index and headers agreed."""
    if not (folder / INDEX).exists():
        return _headers(_single_file(folder))
    if (folder / WEIGHTS).exists():
        raise ContainerError(
            f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that isn't meant"
        )
    places = _weight_map(folder / INDEX)
    entries: dict[str, _Entry] = {}
    for name in sorted(set(places.values())):
        shard = folder / name
        if not shard.is_file():
            raise ContainerError(f"{shard}: is missing, but {INDEX} names it; {AGAIN}")
        headers = _headers(shard)
        for key, entry in headers.items():
            _check_place(key, entry, places, entries)
        entries |= headers
    if absent := sorted(set(places) - set(entries)):
        raise ContainerError(
            f"{folder / places[absent[0]]}: tensor {absent[0]!r} is missing, but {INDEX} says it "
            f"is there; the shard is of another checkpoint: {AGAIN}"
        )
    return entries


def _check_place(
    key: str, entry: _Entry, places: dict[str, str], entries: dict[str, _Entry]
) -> None:
    if key in entries:
        raise ContainerError(
            f"{entry.file}: tensor {key!r} is in {entries[key].file.name} too; "
            f"the shards are of different checkpoints: {AGAIN}"
        )
    if key not in places:
        raise ContainerError(
            f"{entry.file}: tensor {key!r} is not in {INDEX}; "
            f"the shard is of another checkpoint: {AGAIN}"
        )
    if places[key] != entry.file.name:
        raise ContainerError(
            f"{entry.file}: tensor {key!r} should be in {places[key]} by {INDEX}; "
            f"the shards are of different checkpoints: {AGAIN}"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Shard name by tensor, each a plain name in the index's own folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ContainerError(f"{index}: has no weight_map of tensors and shards; {AGAIN}")
    for key, name in places.items():
        plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise ContainerError(
                f"{index}: tensor {key!r} lies in {name!r}, which is no plain name of a "
                f".safetensors file; {AGAIN}"
            )
    return places


def _single_file(folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if folder / WEIGHTS in files or len(files) == 1:
        return folder / WEIGHTS if folder / WEIGHTS in files else files[0]
    if files:
        raise ContainerError(
            f"{folder}: holds {len(files)} .safetensors files but no {INDEX}; {AGAIN}"
        )
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES):
        raise ContainerError(
            f"{folder}: holds pickles ({pickles[0]}) and no .safetensors file; vqbench never "
            f"loads pickles, which can run code: convert them to safetensors"
        )
    raise ContainerError(f"{folder}: holds no .safetensors file; give a checkpoint's folder")


def _headers(path: Path) -> dict[str, _Entry]:
    with opened(path) as file:
        return {key: _entry(path, file, key) for key in file.keys()}  # noqa: SIM118


def _entry(path: Path, file: Any, key: str) -> _Entry:
    header = file.get_slice(key)
    return _Entry(path, tuple(header.get_shape()), str(header.get_dtype()))


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from itself once it was changed."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The mapped file; safetensors bounds its offsets by the file's size."""
    try:
        if not path.is_file():
            raise ContainerError(f"{path}: is not a file; {AGAIN}")
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise ContainerError(f"{path}: {_kind(path)} ({_one_line(error)})") from error


def _kind(path: Path) -> str:
    """What a file is that safetensors can't read, and what to do."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return (
            "is a zip or pickle file, which vqbench never loads; "
            "convert it with safetensors.torch.save_file"
        )
    return f"is truncated, damaged or no safetensors file; {AGAIN}"


def _unreadable(path: Path, error: OSError) -> ContainerError:
    reason = error.strerror or str(error)
    return ContainerError(f"{path}: can't be read ({reason}); check the path and its mode")


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
