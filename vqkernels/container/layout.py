"""Where parts lie in a file: each at a multiple of 64 bytes from the file's start.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON), and the
tensors, which may leave no holes. So the header ends in spaces, up to a multiple of 64 bytes from
the file's start; and where a part ends elsewhere and another one follows, a tensor of zeros fills
the gap: U8 `[gap]`, called `~0`, `~1`, ... in the order of the file. No part is called so, since
their keys hold a `/`. Nothing follows the last part. Version 1 has neither pads nor alignment.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqkernels.container.checksums import raw_bytes
from vqkernels.container.stored import DTYPES
from vqkernels.errors import ContainerError

__all__ = ["ALIGNMENT", "Place", "lay_out", "locate"]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load of any CPU


def lay_out(header: Mapping[str, str], stored: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a file with these strings in its header and `stored` in this order.

    Not by the library's own writer: that one needs every byte in memory twice, orders its
    metadata at random, aligns to 8 bytes, and reports a full disk as text.
    """
    content: dict[str, Any] = {"__metadata__": dict(header)}
    pieces: list[bytes | memoryview] = []
    end = pads = 0
    for key, value in stored.items():
        if gap := -end % ALIGNMENT:
            content[f"~{pads}"] = _entry("U8", [gap], end)
            pieces.append(bytes(gap))
            end, pads = end + gap, pads + 1
        content[key] = _entry(DTYPES[value.dtype], list(value.shape), end, value.nbytes)
        pieces.append(raw_bytes(value))
        end += value.nbytes
    # unescaped, for in \u00e9 a flipped bit can go unseen (\u00E9 is the same letter)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def _entry(dtype: str, shape: list[int], start: int, nbytes: int | None = None) -> dict[str, Any]:
    size = shape[0] if nbytes is None else nbytes
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part lies: bytes from the file's start, and the pad behind it, if there is one."""

    offset: int
    nbytes: int
    pad: str = ""
    pad_nbytes: int = 0


def locate(
    file: Any, parts: Mapping[str, int], file_size: int, *, padded: bool
) -> dict[str, Place]:
    """The place of each part, by key.

    file: as the safetensors library opened it, so without holes and as long as its header says,
        `file_size`.
    parts: bytes of each part, by key; all of them are in the file.
    padded: whether parts lie at multiples of 64 bytes, with pads between them.

    Raises ContainerError for a tensor that is neither part nor pad, and for a part that lies
    elsewhere. That pads are zeros is for their readers to check.
    """
    order = file.offset_keys()
    if strange := sorted(
        key for key in order if key not in parts and not (padded and _is_pad(key))
    ):
        raise ContainerError(f"{strange[0]!r} belongs to no tensor of the description")
    sizes = {key: parts[key] if key in parts else _pad_size(file, key) for key in order}
    places: dict[str, Place] = {}
    offset, before, pads = file_size - sum(sizes.values()), "", 0
    for key in order:
        if key in parts:
            if padded and offset % ALIGNMENT:
                raise ContainerError(f"{key!r} lies at byte {offset:,}, no multiple of {ALIGNMENT}")
            places[key], before = Place(offset, sizes[key]), key
        else:
            last = key == order[-1]
            if not before or last or key != f"~{pads}" or sizes[key] != -offset % ALIGNMENT:
                raise ContainerError(
                    f"{key!r} is no pad number {pads} to a multiple of {ALIGNMENT} bytes"
                )
            places[before] = dataclasses.replace(places[before], pad=key, pad_nbytes=sizes[key])
            pads, before = pads + 1, ""
        offset += sizes[key]
    return places


def _is_pad(key: str) -> bool:
    return key.startswith("~") and "/" not in key


def _pad_size(file: Any, key: str) -> int:
    found = file.get_slice(key)
    shape = found.get_shape()
    if str(found.get_dtype()) != "U8" or len(shape) != 1 or not 0 < shape[0] < ALIGNMENT:
        raise ContainerError(
            f"{key!r} is {found.get_dtype()} {list(shape)}, no pad of 1 to {ALIGNMENT - 1} bytes"
        )
    return math.prod(shape)
