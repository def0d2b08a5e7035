"""Writing a checkpoint folder: whole or not at all, and one group of tensors in memory at a time.

What each tensor will be is known before it is made, so a file's header is written first and every
tensor goes to its place as it comes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vqkernels.atomic import staged
from vqkernels.container.checksums import raw_bytes
from vqkernels.errors import ContainerError
from vqkernels.formats.checkpoint import CONFIG
from vqkernels.formats.tensor_files import DTYPES, INDEX, WEIGHTS

__all__ = [
    "SHARD_BYTES",
    "Group",
    "dense_group",
    "with_quantization",
    "write_checkpoint",
    "write_file",
]

SHARD_BYTES = 5_000_000_000  # transformers' own limit of a file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that are made together, and lie in one file: shape and dtype of each, by key.

    make: gives them, as announced.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    groups: Sequence[Group],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config` and the tensors of `groups` to a new `folder`.

    One file, or shards of up to `shard_bytes` (or of one larger group) with an index. Equal
    arguments give equal bytes. Raises ContainerError where the folder holds something or can't
    be written, and whatever making a tensor raises; then nothing is left behind.
    """
    folder = Path(folder)
    _check_new(folder)
    _check_keys(folder, groups)
    try:
        text = json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ContainerError(f"{folder / CONFIG}: no JSON ({error}); correct the config") from error
    shards = _shards(groups, shard_bytes)
    total = sum(group.nbytes for group in groups)
    with staged(folder, need=total) as made:
        made.mkdir()
        for name, shard in shards.items():
            write_file(made / name, shard)
        # last, so that what is there is not taken for a checkpoint before it is one
        if list(shards) != [WEIGHTS]:
            places = {
                key: name for name, shard in shards.items() for g in shard for key in g.tensors
            }
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(places.items())),
            }
            (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (made / CONFIG).write_text(text, encoding="utf-8")


def dense_group(tensors: Mapping[str, Tensor], key: str) -> Group:
    """Tensor `key` of `tensors`, as it is; looked up once here, and once more to be written."""
    value = tensors[key]
    return Group({key: (tuple(value.shape), value.dtype)}, partial(_looked_up, tensors, key))


def _looked_up(tensors: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    return {key: tensors[key]}


def with_quantization(
    config: Mapping[str, Any] | None, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """A model's `config` with this quantization_config in the place of any other."""
    content = dict(config or {})
    if isinstance(text := content.get("text_config"), Mapping):
        content["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return {**content, "quantization_config": dict(quantization)}


def _check_new(folder: Path) -> None:
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ContainerError(f"{folder}: holds something already; name a new folder")
    except OSError as error:
        raise ContainerError(
            f"{folder}: can't be read ({error.strerror}); choose another folder"
        ) from error


def _check_keys(folder: Path, groups: Sequence[Group]) -> None:
    seen: set[str] = set()
    for group in groups:
        for key, (_, dtype) in group.tensors.items():
            if key in seen or key == "__metadata__":
                raise ContainerError(
                    f"{folder}: tensor {key!r} is there twice, or has safetensors' own name; "
                    f"rename it"
                )
            if dtype not in _NAMES:
                raise ContainerError(f"{folder}: tensor {key!r} is {dtype}, which can't be stored")
            seen.add(key)
    if not seen:
        raise ContainerError(f"{folder}: no tensors to write; name one at least")


def _shards(groups: Sequence[Group], shard_bytes: int) -> dict[str, list[Group]]:
    """Groups by the name of their file, in order."""
    shards: list[list[Group]] = []
    room = 0
    for group in groups:
        if not shards or group.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(group)
        room -= group.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_file(path: Path, groups: Sequence[Group]) -> None:
    """Write the tensors of `groups` to the new safetensors file `path`, a group at a time."""
    tensors = {key: entry for group in groups for key, entry in group.tensors.items()}
    # widest elements first, so that each lies at a multiple of its width
    order = sorted(tensors, key=lambda key: (-tensors[key][1].itemsize, key))
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    places: dict[str, int] = {}
    end = 0
    for key in order:
        shape, dtype = tensors[key]
        places[key], end = end, end + math.prod(shape) * dtype.itemsize
        content[key] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [places[key], end],
        }
    head = json.dumps(content, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        start = file.tell()
        for group in groups:
            _write_group(file, group, {key: start + places[key] for key in group.tensors})


def _write_group(file: BinaryIO, group: Group, places: Mapping[str, int]) -> None:
    # its own function, so that one group is gone before the next is made
    made = group.make()
    assert set(made) == set(group.tensors), sorted(made)
    for key, value in made.items():
        assert (tuple(value.shape), value.dtype) == group.tensors[key], key
        file.seek(places[key])
        file.write(raw_bytes(value.detach().cpu().contiguous()))
