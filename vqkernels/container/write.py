"""Writing containers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import vqkernels
from vqkernels.atomic import write_atomically
from vqkernels.container.checksums import decoded_sha256, raw_bytes, sha256
from vqkernels.container.manifest import (
    CONTAINER_VERSION,
    ContainerInfo,
    TensorInfo,
    check_name,
    located,
    to_header,
)
from vqkernels.container.stored import DTYPES, pack, stored_table
from vqkernels.errors import ContainerError
from vqkernels.source import Outline
from vqkernels.spec import SPEC_VERSION
from vqkernels.tensor import QuantizedTensor

__all__ = ["Prepared", "prepare", "save", "serialise"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A matrix on its way to a file: what the manifest says of it, and its stored parts."""

    info: TensorInfo
    parts: Mapping[str, Tensor]


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedTensor],
    *,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path`, whole or not at all; a file already there is replaced.

    `provenance` is kept as it is (date, seed, method, ...), with the vqbench version as
    `creator`. Equal arguments give equal bytes. Raises TensorError for an invalid tensor and
    ContainerError where the file can't be written; then nothing is left, and what was there is
    untouched.
    """
    path = Path(path)
    with located(path):
        origin = checked_provenance(provenance)
        if not tensors:
            raise ContainerError("no tensors to save; name one at least")
        # each looked up once: a lookup may read, check and unpack
        matrices = [prepare(name, tensor) for name, tensor in tensors.items()]
        pieces = serialise(matrices, origin)
    write_atomically(path, pieces)


def checked_provenance(provenance: Mapping[str, str] | None) -> dict[str, str]:
    """`provenance` with its creator. Raises ContainerError where it is no text."""
    origin = {"creator": f"vqbench {vqkernels.__version__}", **(provenance or {})}
    if not all(isinstance(text, str) for item in origin.items() for text in item):
        raise ContainerError("provenance holds something else than strings; use str()")
    return origin


def prepare(name: str, tensor: QuantizedTensor) -> Prepared:
    """`tensor` checked, packed and summed. Raises TensorError and ContainerError."""
    check_name(name)
    where = f"tensor {name!r}"
    tensor.validate(where)
    cpu = tensor.to("cpu")
    parts = {part: value.detach().contiguous() for part, value in cpu.parts.items()}
    parts["codes"] = pack(parts["codes"], tensor.spec)
    outline = Outline(spec=tensor.spec, n=tensor.n, k=tensor.k, bias="bias" in parts)
    table = stored_table(outline)
    assert {part: tuple(parts[part].shape) for part in table} == {
        part: entry.shape for part, entry in table.items()
    }
    info = TensorInfo(
        name=name,
        spec=tensor.spec,
        n=tensor.n,
        k=tensor.k,
        bias=outline.bias,
        checksums={part: sha256(parts[part]) for part in table},
        decoded_checksum=decoded_sha256(cpu, where),
    )
    return Prepared(info, {part: parts[part] for part in table})


def serialise(matrices: list[Prepared], provenance: Mapping[str, str]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file of `matrices`: its head, then its tensors.

    Not by the library's own writer: that one needs every byte in memory twice, orders its
    metadata at random, and reports a full disk as text. Raises ContainerError where the
    description is too long.
    """
    info = ContainerInfo(
        version=CONTAINER_VERSION,
        spec_version=SPEC_VERSION,
        provenance=provenance,
        tensors=tuple(matrix.info for matrix in matrices),
    )
    stored = {
        f"{matrix.info.name}/{part}": value
        for matrix in matrices
        for part, value in matrix.parts.items()
    }
    # widest elements first, as the library does, so that each lies at a multiple of its width
    keys = sorted(stored, key=lambda key: (-stored[key].element_size(), key))
    content: dict[str, Any] = {"__metadata__": to_header(info)}
    end = 0
    for key in keys:
        start, end = end, end + stored[key].nbytes
        content[key] = {
            "dtype": DTYPES[stored[key].dtype],
            "shape": list(stored[key].shape),
            "data_offsets": [start, end],
        }
    # unescaped, for in \u00e9 a flipped bit can go unseen (\u00E9 is the same letter)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(raw_bytes(stored[key]) for key in keys)]
