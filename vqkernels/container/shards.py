"""Several container files as one: written matrix by matrix, opened without reading any.

A shard is written under a name that means nothing, and gets its own once all of them are whole;
the index, replaced last and at once, is what says which files are the set. So a folder holds the
old set or the new one at every moment, whenever its writer is killed, and what is of neither is
removed by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vqkernels.atomic import explained, locked, sync_folder, write_atomically, write_through
from vqkernels.container.base import Container
from vqkernels.container.index import (
    INDEX,
    MAX_SHARDS,
    Shard,
    ShardIndex,
    index_bytes,
    is_shard_name,
    read_index,
    shard_label,
    shard_name,
)
from vqkernels.container.manifest import Coding, ContainerInfo, from_header, located, to_header
from vqkernels.container.origin import Made, checked_provenance
from vqkernels.container.read import open_file
from vqkernels.container.signed import DIGEST
from vqkernels.container.write import Prepared, prepare_all, serialise
from vqkernels.errors import ContainerError
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "TEMPORARY",
    "ShardWriter",
    "ShardedContainer",
    "open_shards",
    "save_shards",
    "write_shards",
]

# Stands in a draft's label, with MAX_SHARDS for the count: both are known at the end only.
_NO_SET = "0" * 64

TEMPORARY = ".vqbench-shard-"

_AGAIN = "copy the whole folder again from its source, or quantise again"


def save_shards(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedTensor],
    *,
    shard_bytes: int,
    provenance: Mapping[str, str] | None = None,
    made: Mapping[str, Made] | None = None,
    usage: bool = True,
    codes: Coding = "packed",
) -> None:
    """Write `tensors` as shards of about `shard_bytes` and their index into `folder`.

    A shard is a container and holds whole matrices: one that is larger than `shard_bytes` has a
    shard of its own. At most one shard's matrices are in memory, and each is looked up once. The
    folder is made if need be; a set that is there is replaced, whole or not at all, and files
    called as shards that are of no set are removed. Other options and errors as for `save`.
    """
    folder = Path(folder)
    matrices = prepare_all(folder, tensors, made=made, usage=usage, codes=codes)
    write_shards(folder, matrices, shard_bytes=shard_bytes, provenance=provenance)


def write_shards(
    folder: Path,
    matrices: Iterable[Prepared],
    *,
    shard_bytes: int,
    provenance: Mapping[str, str] | None,
) -> None:
    """Write `matrices`, each taken when its turn comes, as `save_shards` does."""
    if shard_bytes < 1:
        raise ContainerError(f"{folder}: shards of {shard_bytes} bytes; use 1 or more")
    with made_folder(folder), locked(folder / INDEX), _swept(folder):
        writer = ShardWriter(folder, provenance)
        for matrix in matrices:
            if writer.pending_bytes and writer.pending_bytes + matrix.nbytes > shard_bytes:
                writer.flush()
            writer.add(matrix)
        writer.finish()


@dataclasses.dataclass(frozen=True)
class _Written:
    """A shard on the disk that has no name yet; `head` is its safetensors header."""

    path: Path
    head: bytes
    sizes: Mapping[str, int]


class ShardWriter:
    """The shards of one set on their way into a folder; nothing names them before `finish`."""

    def __init__(self, folder: Path, provenance: Mapping[str, str] | None) -> None:
        with located(folder):
            self._provenance = checked_provenance(provenance)
        self._folder = folder
        self._pending: list[Prepared] = []
        self._written: list[_Written] = []

    @property
    def pending_bytes(self) -> int:
        """Bytes of the matrices that wait for the next `flush`."""
        return sum(matrix.nbytes for matrix in self._pending)

    def add(self, matrix: Prepared) -> None:
        """Put `matrix` into the next shard."""
        self._pending.append(matrix)

    def flush(self) -> None:
        """Write the matrices added since the last time as one shard, and forget them."""
        label = shard_label(_NO_SET, len(self._written) + 1, MAX_SHARDS)
        with located(self._folder):
            pieces = serialise(self._pending, self._provenance, {"shard": label})
        path = self._folder / f"{TEMPORARY}{uuid.uuid4().hex}.tmp"
        write_through(path, pieces, named=self._folder)
        sizes = {
            f"{matrix.info.name}/{part}": size
            for matrix in self._pending
            for part, size in matrix.info.part_bytes.items()
        }
        self._written.append(_Written(path, bytes(pieces[1]), sizes))
        self._pending = []

    def finish(self) -> None:
        """Write what is left, name all shards, and replace the index."""
        if self._pending:
            self.flush()
        count = len(self._written)
        if count > MAX_SHARDS:
            raise ContainerError(f"{self._folder}: {count} shards, over {MAX_SHARDS}; use larger")
        drafts = [_description(shard.head).digest for shard in self._written]
        set_id = hashlib.sha256("".join(drafts).encode()).hexdigest()
        shards = [
            self._labelled(shard, shard_label(set_id, number, count))
            for number, shard in enumerate(self._written, start=1)
        ]
        with explained(self._folder):
            for written, shard in zip(self._written, shards, strict=True):
                written.path.replace(self._folder / shard.file)
        sync_folder(self._folder)
        index = ShardIndex(
            set_id=set_id,
            shards=tuple(shards),
            weight_map={
                key: shard.file
                for written, shard in zip(self._written, shards, strict=True)
                for key in written.sizes
            },
            total_size=sum(sum(written.sizes.values()) for written in self._written),
        )
        write_atomically(self._folder / INDEX, [index_bytes(index)])

    def _labelled(self, written: _Written, label: Mapping[str, Any]) -> Shard:
        """Write `label` into a shard's header, which was left long enough for it."""
        content = json.loads(written.head)
        draft = _description(written.head)
        content["__metadata__"] = to_header(dataclasses.replace(draft, extra={"shard": label}))
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        assert len(text) <= len(written.head), "the draft's label is the longest"
        with explained(self._folder), written.path.open("r+b") as file:
            file.seek(8)
            file.write(text.ljust(len(written.head)))
            file.flush()
            os.fsync(file.fileno())
        return Shard(
            file=shard_name(label["set"], label["number"], label["count"]),
            size_bytes=written.path.stat().st_size,
            digest=content["__metadata__"][DIGEST],
            names=tuple(tensor.name for tensor in draft.tensors),
        )


def _description(head: bytes) -> ContainerInfo:
    return from_header(json.loads(head)["__metadata__"])


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if there is none; if what follows fails, and left it empty, remove it again."""
    there = folder.exists()
    with explained(folder):
        folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Before and after, remove shards in `folder` that its index doesn't name.

    They are what killed writers left, what this one leaves where it fails, or the old set.
    """
    _sweep(folder)
    try:
        yield
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    index, used = folder / INDEX, set()
    if index.exists():
        # somebody else's index, or a damaged one, is not ours to replace
        with located(index):
            used = {shard.file for shard in read_index(index).shards}
    with explained(folder):
        for path in list(folder.iterdir()):
            if path.name.startswith(TEMPORARY) or (
                is_shard_name(path.name) and path.name not in used
            ):
                path.unlink()


# ------------------------------------------------------------------------------------------------
# reading


class ShardedContainer(Container):
    """The matrices of a set of shards, each file mapped into memory; see `open_container`.

    A set that is replaced meanwhile stays readable here as it was.
    """

    def __init__(self, path: Path, info: ContainerInfo, shards: Sequence[Container]) -> None:
        super().__init__(path, info)
        self._homes = {name: shard for shard in shards for name in shard}

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._homes[name][name]

    def verify(self, name: str) -> QuantizedTensor:
        """Matrix `name`, its usage and its dequantised values checked too."""
        return self._homes[name].verify(name)

    def usage(self, name: str) -> dict[int, Tensor]:
        """How often each entry of a stage is used, for stages that store it."""
        return self._homes[name].usage(name)


def open_shards(path: Path) -> ShardedContainer:
    """The set whose index, or folder, is `path`: index and headers checked against each other.

    Raises ContainerError, which names the index or the shard, where they don't agree.
    """
    path = path / INDEX if path.is_dir() else path
    with located(path):
        index = read_index(path)
    shards = []
    for number, entry in enumerate(index.shards, start=1):
        file = path.parent / entry.file
        with located(file):
            _check_file(file, entry)
        container = open_file(file)
        with located(file):
            _check_shard(
                container.info, entry, shard_label(index.set_id, number, len(index.shards))
            )
        shards.append(container)
    with located(path):
        _check_map(index, shards)
    info = dataclasses.replace(
        shards[0].info,
        tensors=tuple(tensor for shard in shards for tensor in shard.info.tensors),
        extra={"set": index.set_id, "shards": [shard.file for shard in index.shards]},
        digest=index.digest,
    )
    return ShardedContainer(path, info, shards)


def _check_file(file: Path, entry: Shard) -> None:
    if not file.is_file():
        more = f" and {len(entry.names) - 1} more" if len(entry.names) > 1 else ""
        raise ContainerError(
            f"is missing, with tensor {entry.names[0]!r}{more}, but {INDEX} names it; {_AGAIN}"
        )
    if (size := file.stat().st_size) != entry.size_bytes:
        raise ContainerError(
            f"is {size:,} bytes long, but {INDEX} says {entry.size_bytes:,}: truncated, or of "
            f"another set; {_AGAIN}"
        )


def _check_shard(info: ContainerInfo, entry: Shard, label: Mapping[str, Any]) -> None:
    """Raise ContainerError unless a shard's description is the one that the index speaks of."""
    if (found := info.extra.get("shard")) != label:
        raise ContainerError(
            f"says of itself {_told(found)}, but {INDEX} wants {_told(label)} here: shards were "
            f"swapped or are of another model; {_AGAIN}"
        )
    if tuple(tensor.name for tensor in info.tensors) != entry.names:
        names = {tensor.name for tensor in info.tensors}.symmetric_difference(entry.names)
        raise ContainerError(
            f"tensor {min(names, default=entry.names[0])!r}: {INDEX} and the shard's header "
            f"disagree about it; {_AGAIN}"
        )
    if info.digest != entry.digest:
        raise ContainerError(
            f"its description isn't the one that {INDEX} speaks of: it was written anew, or is of "
            f"another model; {_AGAIN}"
        )


def _told(label: object) -> str:
    if not isinstance(label, Mapping):
        return "no shard"
    number, count, set_id = (repr(label.get(name))[:20] for name in ("number", "count", "set"))
    return f"shard {number} of {count}, set {set_id}"


def _check_map(index: ShardIndex, shards: Sequence[Container]) -> None:
    """Raise ContainerError unless the index names every part of every shard, where it lies."""
    homes: dict[str, tuple[str, str]] = {}
    size = 0
    for entry, shard in zip(index.shards, shards, strict=True):
        for tensor in shard.info.tensors:
            homes |= {
                f"{tensor.name}/{part}": (tensor.name, entry.file) for part in tensor.checksums
            }
            size += tensor.stored_bytes
    for key, (name, file) in homes.items():
        if (found := index.weight_map.get(key)) != file:
            place = "is not in weight_map" if found is None else f"is in {found!r} by weight_map"
            raise ContainerError(f"tensor {name!r}: {key!r} {place}, but it is in {file}; {_AGAIN}")
    if extra := sorted(set(index.weight_map) - set(homes)):
        raise ContainerError(f"weight_map names {extra[0]!r}, which is in no shard; {_AGAIN}")
    if size != index.total_size:
        raise ContainerError(f"total_size is {index.total_size}, but parts take {size}; {_AGAIN}")
