"""parallel.json: which rank has what of each matrix, and how to tell that it is the right rank.

The file is the two strings of `container.signed`; the object:

    parallel_version: 1
    folder: `ranks-` and the first 16 digits of the SHA-256 of `{"indexes":...,"tensors":...}`,
        written without spaces
    indexes: `vqbench_sha256` of each rank's index, rank 0 first
    tensors: a list, in the order of each rank's matrices, of
        name, n, k, bias, spec: of the whole matrix, as in a container
        axis: `row` or `column`
        cuts: the first output (row) or input (column) feature of each rank, then their number
        owners: the rank of each stored column, where a permuted matrix is cut by column
        sha256: of each part of the whole as `part_table` has it, codes not packed
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from vqkernels.container.checksums import sha256
from vqkernels.container.manifest import checksums_in, outline_in
from vqkernels.container.signed import DAMAGED, check_version, field, read_json, sign, signed
from vqkernels.errors import ContainerError, VqError
from vqkernels.parallel.slices import Slice, SplitAxis
from vqkernels.parts import check_shape
from vqkernels.source import Outline
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "MAPPING",
    "MAX_RANKS",
    "Cut",
    "Mapped",
    "entry_of",
    "is_ranks_name",
    "mapping_bytes",
    "rank_name",
    "read_mapping",
]

MAPPING = "parallel.json"
PARALLEL_VERSION = 1
MAX_RANKS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How one matrix was cut; fields as in the file."""

    name: str
    whole: Outline
    axis: SplitAxis
    cuts: tuple[int, ...]
    owners: tuple[int, ...]
    checksums: Mapping[str, str]

    def shape(self, rank: int) -> tuple[int, int]:
        """The shape of `rank`'s slice."""
        share = self.cuts[rank + 1] - self.cuts[rank]
        return (share, self.whole.k) if self.axis == "row" else (self.whole.n, share)

    def slices(self, tensors: Sequence[QuantizedTensor]) -> list[Slice]:
        """The ranks' matrices as what they are of the whole."""
        owners = torch.tensor(self.owners)
        return [
            Slice(
                tensor=tensor,
                whole=self.whole,
                axis=self.axis,
                rank=rank,
                ranks=len(tensors),
                start=self.cuts[rank],
                stop=self.cuts[rank + 1],
                positions=(owners == rank).nonzero()[:, 0] if self.owners else None,
            )
            for rank, tensor in enumerate(tensors)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapped:
    """What parallel.json says."""

    folder: str
    indexes: tuple[str, ...]
    tensors: tuple[Cut, ...]

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.indexes)


def rank_name(rank: int, ranks: int) -> str:
    """The folder of a rank."""
    return f"rank-{rank}-of-{ranks}"


def is_ranks_name(name: str) -> bool:
    """Whether a folder called `name` holds the ranks of some mapping."""
    return re.fullmatch("ranks-[0-9a-f]{16}", name) is not None


def entry_of(name: str, tensor: QuantizedTensor, slices: Sequence[Slice]) -> dict[str, Any]:
    """What the file says of `tensor`, which was cut into `slices`."""
    owners = torch.zeros(tensor.k, dtype=torch.int64)
    for one in slices:
        if one.positions is not None:
            owners[one.positions] = one.rank
    permuted = slices[0].positions is not None
    return {
        "name": name,
        "n": tensor.n,
        "k": tensor.k,
        "bias": tensor.bias is not None,
        "spec": tensor.spec.to_dict(),
        "axis": slices[0].axis,
        "cuts": [0, *(one.stop for one in slices)],
        **({"owners": owners.tolist()} if permuted else {}),
        "sha256": {part: sha256(value.cpu().contiguous()) for part, value in tensor.parts.items()},
    }


def mapping_bytes(
    indexes: Sequence[str], entries: Sequence[Mapping[str, Any]]
) -> tuple[str, bytes]:
    """The name of the ranks' folder and the file. Raises ContainerError for too long a one."""
    held = {"indexes": list(indexes), "tensors": list(entries)}
    text = json.dumps(held, separators=(",", ":"))
    folder = f"ranks-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    content = sign({"parallel_version": PARALLEL_VERSION, "folder": folder, **held})
    return folder, (json.dumps(content, indent=2) + "\n").encode("utf-8")


def read_mapping(path: Path) -> Mapped:
    """The mapping at `path`, checked in itself.

    Raises ContainerError, without the file's name, for anything but what `mapping_bytes` makes.
    """
    content = signed(read_json(path))
    check_version(content, "parallel_version", PARALLEL_VERSION)
    folder = field(content, "folder", str, "the file")
    if not is_ranks_name(folder):
        raise ContainerError(f"folder {folder!r} is no name of ranks; {DAMAGED}")
    indexes = field(content, "indexes", list, "the file")
    if not 1 <= len(indexes) <= MAX_RANKS or not all(isinstance(one, str) for one in indexes):
        raise ContainerError(f"indexes should be 1 to {MAX_RANKS} strings; {DAMAGED}")
    entries = field(content, "tensors", list, "the file")
    tensors = tuple(_cut(entry, len(indexes)) for entry in entries)
    if not tensors or len({cut.name for cut in tensors}) != len(tensors):
        raise ContainerError(f"tensors are none, or two have the same name; {DAMAGED}")
    return Mapped(folder=folder, indexes=tuple(indexes), tensors=tensors)


def _cut(entry: Any, ranks: int) -> Cut:
    name, whole = outline_in(entry)
    where = f"tensor {name!r}"
    try:
        check_shape(whole.spec, whole.n, whole.k)
    except VqError as error:
        raise ContainerError(f"{where}: {error}; {DAMAGED}") from error
    checksums = checksums_in(entry, where)
    if set(checksums) != set(whole.table()):
        raise ContainerError(f"{where}: its checksums don't go with its format; {DAMAGED}")
    axis = field(entry, "axis", str, where)
    if axis not in ("row", "column"):
        raise ContainerError(f"{where}: axis {axis!r} is not row or column; {DAMAGED}")
    cuts = _whole_numbers(entry, "cuts", where)
    size = whole.n if axis == "row" else whole.k
    rising = all(one < other for one, other in itertools.pairwise(cuts))
    if len(cuts) != ranks + 1 or (cuts[0], cuts[-1]) != (0, size) or not rising:
        raise ContainerError(f"{where}: cuts don't share {size} features; {DAMAGED}")
    owners: tuple[int, ...] = ()
    if axis == "column" and whole.spec.permuted:
        owners = _whole_numbers(entry, "owners", where)
        shares = [owners.count(rank) for rank in range(ranks)]
        if len(owners) != size or shares != [b - a for a, b in itertools.pairwise(cuts)]:
            raise ContainerError(f"{where}: owners don't go with cuts; {DAMAGED}")
    return Cut(
        name=name,
        whole=whole,
        axis=cast(SplitAxis, axis),
        cuts=cuts,
        owners=owners,
        checksums=checksums,
    )


def _whole_numbers(entry: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    numbers = field(entry, name, list, where)
    # True is an int to Python, and no number to us
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
        raise ContainerError(f"{where}: {name} should be whole numbers; {DAMAGED}")
    return tuple(numbers)
