"""The index of a set of shards: which files, and which matrix lies in which.

`model.safetensors.index.json` is as Hugging Face's libraries write it, so that they read it:

    metadata:
        total_size: bytes of all parts
        vqbench, vqbench_sha256: an object as text and its SHA-256 (see `signed`)
    weight_map: the shard's file name for each part's key, `<name>/<part>`

The object:

    index_version: 1
    set: SHA-256 that tells this set from any other: of the shards' `vqbench_sha256`, one after
        the other, as they would be with set "0" * 64 and count 99999
    shards: a list, shard 1 first, of
        file: `model-<16 digits of the set>-<number>-of-<count>.safetensors`, five digits each
        bytes: its size
        sha256: its `vqbench_sha256`
        names: of its matrices

Each shard says in its description, as `shard`, the set, its number and the count.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqkernels.container.manifest import check_name
from vqkernels.container.signed import (
    DAMAGED,
    DIGEST,
    check_version,
    field,
    read_json,
    sign,
    signed,
)
from vqkernels.errors import ContainerError

__all__ = [
    "INDEX",
    "MAX_SHARDS",
    "Shard",
    "ShardIndex",
    "index_bytes",
    "is_shard_name",
    "read_index",
    "shard_label",
    "shard_name",
]

INDEX = "model.safetensors.index.json"
INDEX_VERSION = 1
MAX_SHARDS = 99999


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What the index says of one file."""

    file: str
    size_bytes: int
    digest: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of a set; `digest` is the SHA-256 of its description, and so of all below it."""

    set_id: str
    shards: tuple[Shard, ...]
    weight_map: Mapping[str, str]
    total_size: int
    digest: str = ""


def shard_label(set_id: str, number: int, count: int) -> dict[str, Any]:
    """What shard `number` of `count`, from 1, says of itself."""
    return {"set": set_id, "number": number, "count": count}


def shard_name(set_id: str, number: int, count: int) -> str:
    """The file name of shard `number` of `count`, from 1."""
    return f"model-{set_id[:16]}-{number:05}-of-{count:05}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether a file called `name` is a shard of some set."""
    return re.fullmatch(r"model-[0-9a-f]{16}-\d{5}-of-\d{5}\.safetensors", name) is not None


def index_bytes(index: ShardIndex) -> bytes:
    """The file that stands for `index`; its digest is what comes out here, whatever it says."""
    shards = [
        {
            "file": shard.file,
            "bytes": shard.size_bytes,
            "sha256": shard.digest,
            "names": list(shard.names),
        }
        for shard in index.shards
    ]
    description = sign({"index_version": INDEX_VERSION, "set": index.set_id, "shards": shards})
    content = {
        "metadata": {"total_size": index.total_size, **description},
        "weight_map": dict(index.weight_map),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def read_index(path: Path) -> ShardIndex:
    """The index at `path`, checked in itself; no shard is looked at.

    Raises ContainerError, without the file's name, for anything but what `index_bytes` makes.
    """
    content = read_json(path)
    metadata = field(content, "metadata", dict, "the index")
    if DIGEST not in metadata:
        raise ContainerError(
            "is the index of a checkpoint, not of a vqbench container; import it "
            "(`vqbench import`), or give another folder"
        )
    description = signed(metadata)
    check_version(description, "index_version", INDEX_VERSION)
    set_id = field(description, "set", str, "the index")
    if not _is_sha256(set_id):
        raise ContainerError(f"set is no SHA-256; {DAMAGED}")
    entries = field(description, "shards", list, "the index")
    if not 1 <= len(entries) <= MAX_SHARDS:
        raise ContainerError(f"{len(entries)} shards, not 1 to {MAX_SHARDS}; {DAMAGED}")
    shards = tuple(
        _shard(entry, shard_name(set_id, number, len(entries)))
        for number, entry in enumerate(entries, start=1)
    )
    seen: set[str] = set()
    for name in (name for shard in shards for name in shard.names):
        if name in seen:
            raise ContainerError(f"tensor {name!r} is in two shards; {DAMAGED}")
        seen.add(name)
    return ShardIndex(
        set_id=set_id,
        shards=shards,
        weight_map=field(content, "weight_map", dict, "the index"),
        total_size=field(metadata, "total_size", int, "metadata"),
        digest=metadata[DIGEST],
    )


def _shard(entry: object, file: str) -> Shard:
    if not isinstance(entry, dict) or entry.get("file") != file:
        raise ContainerError(f"a shard is not called {file!r}, as it should be; {DAMAGED}")
    digest = field(entry, "sha256", str, file)
    names = field(entry, "names", list, file)
    if not names or not all(isinstance(name, str) for name in names):
        raise ContainerError(f"{file}: names should be a list of strings; {DAMAGED}")
    for name in names:
        check_name(name)
    if not _is_sha256(digest):
        raise ContainerError(f"{file}: sha256 is no SHA-256; {DAMAGED}")
    size = field(entry, "bytes", int, file)
    return Shard(file=file, size_bytes=size, digest=digest, names=tuple(names))


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None
