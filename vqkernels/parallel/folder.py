"""A model's matrices cut for several ranks, on the disk: a container a rank.

    parallel.json                    what was cut how (`mapping`)
    ranks-<16 digits>/rank-0-of-4/   rank 0's slices, a set of shards with its index
    ranks-<16 digits>/rank-1-of-4/   ...

A rank reads parallel.json and its own folder; the whole matrices are merged from all. The ranks'
folder has a name of its own, and parallel.json is replaced last: at every moment the folder holds
the old ranks or the new ones, whenever their writer is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqkernels.atomic import explained, locked, sync_folder, write_atomically
from vqkernels.container.access import open_container
from vqkernels.container.base import Container
from vqkernels.container.checksums import sha256
from vqkernels.container.index import INDEX, read_index
from vqkernels.container.manifest import Coding, located
from vqkernels.container.origin import Made
from vqkernels.container.shards import ShardWriter, made_folder
from vqkernels.container.write import Prepared, check_tensors, prepare
from vqkernels.errors import ContainerError, VqError
from vqkernels.parallel import plan
from vqkernels.parallel.mapping import (
    MAPPING,
    MAX_RANKS,
    Cut,
    Mapped,
    entry_of,
    is_ranks_name,
    mapping_bytes,
    rank_name,
    read_mapping,
)
from vqkernels.parallel.slices import Slice, SplitAxis, merge, split
from vqkernels.source import Outline, TensorSource
from vqkernels.tensor import QuantizedTensor

__all__ = ["ParallelSource", "open_parallel", "open_rank", "save_parallel"]

_TEMPORARY = ".vqbench-ranks-"

_AGAIN = "copy the whole folder again from its source, or split again"


def save_parallel(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedTensor],
    *,
    ranks: int,
    axis_of: Callable[[str], SplitAxis] = plan.axis_of,
    shard_bytes: int = 1 << 30,
    provenance: Mapping[str, str] | None = None,
    made: Mapping[str, Made] | None = None,
    usage: bool = True,
    codes: Coding = "packed",
) -> None:
    """Cut each of `tensors` as `axis_of` its name says and write a container for each rank.

    shard_bytes: of all ranks' matrices in memory at once, and so about `ranks` times a shard's.
        Each of `tensors` is looked up once.

    The folder is made if need be; what such a call wrote there before is replaced, whole or not at
    all. Other options and errors as for `save`; and UnsupportedError where a matrix can't be cut.
    """
    folder = Path(folder)
    if shard_bytes < 1:
        raise ContainerError(f"{folder}: shards of {shard_bytes} bytes; use 1 or more")
    if not 1 <= ranks <= MAX_RANKS:
        raise ContainerError(f"{folder}: {ranks} ranks; use 1 to {MAX_RANKS}")
    made = dict(made or {})
    with located(folder):
        check_tensors(tensors, made)
    options: dict[str, Any] = {"usage": usage, "codes": codes}
    with (
        made_folder(folder),
        locked(folder / MAPPING),
        _swept(folder),
        _staged(folder, ranks) as temporary,
    ):
        homes = [temporary / rank_name(rank, ranks) for rank in range(ranks)]
        writers, entries = [ShardWriter(home, provenance) for home in homes], []
        for name, tensor in tensors.items():
            slices = _split(folder, name, tensor, ranks, axis_of(name))
            entries.append(entry_of(name, tensor, slices))
            with located(folder):
                own = [prepare(name, one.tensor, made=made.get(name), **options) for one in slices]
            _add(writers, own, shard_bytes)
        for writer in writers:
            writer.finish()
        with located(folder):
            name, text = mapping_bytes([read_index(home / INDEX).digest for home in homes], entries)
        _move(temporary, folder / name)
        write_atomically(folder / MAPPING, [text])


def _split(
    folder: Path, name: str, tensor: QuantizedTensor, ranks: int, axis: SplitAxis
) -> list[Slice]:
    where = f"tensor {name!r}"
    with located(folder):
        tensor.validate(where)
    try:
        return split(tensor, ranks, axis)
    except VqError as error:
        raise type(error)(f"{folder}: {where}: {error}") from error


def _add(writers: list[ShardWriter], matrices: list[Prepared], shard_bytes: int) -> None:
    """Give each writer its matrix, all of them a new shard where they would hold too much."""
    pending = sum(writer.pending_bytes for writer in writers)
    if pending and pending + sum(matrix.nbytes for matrix in matrices) > shard_bytes:
        for writer in writers:
            writer.flush()
    for writer, matrix in zip(writers, matrices, strict=True):
        writer.add(matrix)


@contextlib.contextmanager
def _staged(folder: Path, ranks: int) -> Iterator[Path]:
    """A temporary folder in `folder` with one for each rank; errors speak of `folder`."""
    temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}.tmp"
    try:
        with explained(folder):
            for rank in range(ranks):
                (temporary / rank_name(rank, ranks)).mkdir(parents=True)
        yield temporary
    except VqError as error:
        raise type(error)(str(error).replace(str(temporary), str(folder))) from error


def _move(temporary: Path, final: Path) -> None:
    """Give the ranks' folders their place, where equal ones may be already."""
    with explained(final.parent):
        for home in sorted(temporary.iterdir()):
            (final / home.name).mkdir(parents=True, exist_ok=True)
            for path in home.iterdir():
                path.replace(final / home.name / path.name)
            sync_folder(final / home.name)
        sync_folder(final)
        sync_folder(final.parent)


@contextlib.contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Before and after, remove ranks in `folder` that its mapping doesn't name."""
    _sweep(folder)
    try:
        yield
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    mapping, used = folder / MAPPING, ""
    if mapping.exists():
        # somebody else's file, or a damaged one, is not ours to replace
        with located(mapping):
            used = read_mapping(mapping).folder
    with explained(folder):
        for path in list(folder.iterdir()):
            if path.name.startswith(_TEMPORARY) or (is_ranks_name(path.name) and path.name != used):
                shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------
# reading


class ParallelSource(TensorSource):
    """The whole matrices of a folder that `save_parallel` wrote, merged when they are asked for.

    path: its parallel.json. ranks: what each holds.
    """

    def __init__(self, path: Path, ranks: list[Container], mapped: Mapped) -> None:
        self.path, self.ranks = path, ranks
        self._cuts = {cut.name: cut for cut in mapped.tensors}

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._merged(name, [rank[name] for rank in self.ranks])

    def verify(self, name: str) -> QuantizedTensor:
        """Matrix `name`, what each rank has of it verified too; see `Container.verify`."""
        return self._merged(name, [rank.verify(name) for rank in self.ranks])

    def _merged(self, name: str, tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
        cut, where = self._cuts[name], f"tensor {name!r}"
        try:
            whole = merge(cut.slices(tensors))
        except VqError as error:
            raise type(error)(f"{self.path}: {where}: {error}") from error
        for part, value in whole.parts.items():
            if sha256(value.contiguous()) != cut.checksums[part]:
                raise ContainerError(
                    f"{self.path}: {where}: merged {part} doesn't match its checksum; {_AGAIN}"
                )
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)

    def outline(self, name: str) -> Outline:
        """What parallel.json says of matrix `name`."""
        return self._cuts[name].whole

    def cut(self, name: str) -> Cut:
        """How matrix `name` was cut."""
        return self._cuts[name]


def open_parallel(folder: str | os.PathLike[str]) -> ParallelSource:
    """The whole matrices in `folder` (or of its parallel.json), all ranks' headers checked.

    Raises ContainerError, which names the file, where they don't belong together; a lookup raises
    ContainerError and TensorError as a container's does, and where merged parts aren't what was
    split.
    """
    path, mapped = _mapped(folder)
    return ParallelSource(path, [_rank(path, mapped, rank) for rank in range(mapped.ranks)], mapped)


def open_rank(folder: str | os.PathLike[str], rank: int) -> Container:
    """What `rank` holds, by the names of the whole matrices; no other rank's files are touched.

    Errors as for `open_parallel`, and ContainerError where there is no such rank.
    """
    path, mapped = _mapped(folder)
    if not 0 <= rank < mapped.ranks:
        raise ContainerError(f"{path}: no rank {rank}; there are ranks 0 to {mapped.ranks - 1}")
    return _rank(path, mapped, rank)


def _mapped(folder: str | os.PathLike[str]) -> tuple[Path, Mapped]:
    path = Path(folder)
    path = path / MAPPING if path.is_dir() else path
    with located(path):
        return path, read_mapping(path)


def _rank(path: Path, mapped: Mapped, rank: int) -> Container:
    home = path.parent / mapped.folder / rank_name(rank, mapped.ranks)
    if not (home / INDEX).is_file():
        raise ContainerError(f"{home / INDEX}: is missing, but {MAPPING} wants it; {_AGAIN}")
    container = open_container(home / INDEX)
    with located(home / INDEX):
        if container.info.digest != mapped.indexes[rank]:
            raise ContainerError(
                f"isn't the index that {MAPPING} speaks of: ranks were swapped or are of another "
                f"model; {_AGAIN}"
            )
        if list(container) != [cut.name for cut in mapped.tensors]:
            names = set(container).symmetric_difference(cut.name for cut in mapped.tensors)
            raise ContainerError(
                f"tensor {min(names, default=next(iter(container)))!r}: {MAPPING} and the rank "
                f"disagree about it; {_AGAIN}"
            )
        for cut in mapped.tensors:
            _check_share(container.outline(cut.name), cut, rank)
    return container


def _check_share(found: Outline, cut: Cut, rank: int) -> None:
    if (found.n, found.k) != cut.shape(rank):
        n, k = cut.shape(rank)
        raise ContainerError(
            f"tensor {cut.name!r} is {found.n} x {found.k}, but {MAPPING} gives the rank "
            f"{n} x {k}; {_AGAIN}"
        )
