"""Containers: quantised matrices in a safetensors file that describes and checks itself.

Part `p` of matrix `name` is the tensor `<name>/<p>`, as `part_table` gives it, except that codes
are packed (`packing`): int32 `[rows, packed_words]`, or of the transposed grid where the format's
traversal is by column. `manifest` says what the header holds.

Reading goes through the safetensors library, which bounds every offset by the file's size; then
shapes, checksums, ranges and NaN are checked, in that order, before a tensor is handed out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import vqkernels
from vqkernels.atomic import write_atomically
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.manifest import (
    CONTAINER_VERSION,
    ContainerInfo,
    TensorInfo,
    check_name,
    from_header,
    to_header,
)
from vqkernels.packing import pack_codes, packed_words, unpack_codes
from vqkernels.parts import Part, check_shape, code_grid, part_table
from vqkernels.spec import SPEC_VERSION, CodebookSpec
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = ["CONTAINER_VERSION", "ContainerInfo", "TensorInfo", "describe", "load", "save"]

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.int8: "I8",
}

_PIECE = 1 << 21  # weights or code bits worked on at once: 16 MB in float64
_MAX_PIECE = 1 << 29  # 4 GB; only codebook groups of very many rows come near it

_AGAIN = "copy it again from its source, or quantise again"


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
    origin = {"creator": f"vqbench {vqkernels.__version__}", **(provenance or {})}
    if not all(isinstance(text, str) for item in origin.items() for text in item):
        raise ContainerError(f"{path}: provenance holds something else than strings; use str()")
    if not tensors:
        raise ContainerError(f"{path}: no tensors to save; name one at least")
    described, stored = [], {}
    for name, tensor in tensors.items():
        with _located(path):
            check_name(name)
            entry, parts = _prepare(name, tensor)
        described.append(entry)
        stored.update({f"{name}/{part}": value for part, value in parts.items()})
    info = ContainerInfo(
        version=CONTAINER_VERSION,
        spec_version=SPEC_VERSION,
        provenance=origin,
        tensors=tuple(described),
    )
    with _located(path):
        header = to_header(info)
    write_atomically(path, _serialise(header, stored))


def load(
    path: str | os.PathLike[str], *, names: Iterable[str] | None = None, decoded: bool = False
) -> dict[str, QuantizedTensor]:
    """The matrices of the container at `path` (those in `names` only), checked, on the CPU.

    `decoded` also checks the dequantised values, which takes as long as dequantising does.
    Raises ContainerError for a file that is damaged, truncated, of a newer version or not a
    container, and TensorError for parts that don't fit their format.
    """
    path = Path(path)
    with _opened(path) as (file, info):
        known = {tensor.name: tensor for tensor in info.tensors}
        wanted = list(known) if names is None else list(dict.fromkeys(names))
        if absent := [name for name in wanted if name not in known]:
            raise ContainerError(f"no tensor {absent[0]!r}; the file holds {', '.join(known)}")
        return {name: _read(file, known[name], decoded=decoded) for name in wanted}


def describe(path: str | os.PathLike[str]) -> ContainerInfo:
    """What the container at `path` holds, from its header alone: no tensor data is read.

    Raises ContainerError as `load` does, except for what only the data can show.
    """
    with _opened(Path(path)) as (_, info):
        return info


# ------------------------------------------------------------------------------------------------
# writing


def _prepare(name: str, tensor: QuantizedTensor) -> tuple[TensorInfo, dict[str, Tensor]]:
    where = f"tensor {name!r}"
    tensor.validate(where)
    spec, cpu = tensor.spec, tensor.to("cpu")
    parts = {part: value.detach().contiguous() for part, value in cpu.parts.items()}
    parts["codes"] = _pack(parts["codes"], spec)
    table = _stored_table(spec, tensor.n, tensor.k, bias="bias" in parts)
    assert {part: tuple(parts[part].shape) for part in table} == {
        part: entry.shape for part, entry in table.items()
    }
    info = TensorInfo(
        name=name,
        spec=spec,
        n=tensor.n,
        k=tensor.k,
        bias="bias" in parts,
        checksums={part: _sha256(parts[part]) for part in table},
        decoded_checksum=_decoded_sha256(cpu, where),
    )
    return info, {part: parts[part] for part in table}


def _pack(codes: Tensor, spec: CodebookSpec) -> Tensor:
    grid = codes.transpose(0, 1) if spec.traversal == "column" else codes
    # packing spreads each bit over a byte, so a few rows at a time
    step = max(1, _PIECE // (grid.shape[1] * spec.vector_bits))
    return torch.cat([pack_codes(piece, spec.code_bits) for piece in torch.split(grid, step)])


def _unpack(words: Tensor, spec: CodebookSpec, part: Part, where: str) -> Tensor:
    """Codes as `part` has them; their range is checked first, which a narrower dtype would hide."""
    columns = part.shape[0] if spec.traversal == "column" else part.shape[1]
    step = max(1, _PIECE // (columns * spec.vector_bits))
    pieces = []
    for piece in torch.split(words, step):
        codes = unpack_codes(piece, columns, spec.code_bits)
        if (top := int(codes.to(torch.int32).max())) >= part.limit:
            raise TensorError(
                f"{where}: codes reach {top}, but the largest codebook has {part.limit} entries; "
                f"the file was made for another codebook: quantise again"
            )
        pieces.append(codes.to(part.dtype))
    grid = torch.cat(pieces)
    return grid.transpose(0, 1).contiguous() if spec.traversal == "column" else grid


def _stored_table(spec: CodebookSpec, n: int, k: int, *, bias: bool) -> dict[str, Part]:
    """`part_table`, with the codes as they lie in a file."""
    table = part_table(spec, n, k, bias=bias)
    rows, columns = code_grid(spec, n, k)
    if spec.traversal == "column":
        rows, columns = columns, rows
    shape = (rows, packed_words(columns, spec.code_bits))
    table["codes"] = dataclasses.replace(table["codes"], shape=shape, dtype=torch.int32)
    return table


def _serialise(header: dict[str, str], stored: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file: its head, then its tensors.

    Not by the library's own writer: that one needs every byte in memory twice, orders its
    metadata at random, and reports a full disk as text.
    """
    # widest elements first, as the library does, so that each lies at a multiple of its width
    keys = sorted(stored, key=lambda key: (-stored[key].element_size(), key))
    content: dict[str, Any] = {"__metadata__": header}
    end = 0
    for key in keys:
        start, end = end, end + stored[key].nbytes
        content[key] = {
            "dtype": _DTYPES[stored[key].dtype],
            "shape": list(stored[key].shape),
            "data_offsets": [start, end],
        }
    # unescaped, for in \u00e9 a flipped bit can go unseen (\u00E9 is the same letter)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(_bytes(stored[key]) for key in keys)]


# ------------------------------------------------------------------------------------------------
# reading


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, ContainerInfo]]:
    """The open file and its checked description; errors inside get the file's name in front."""
    with _located(path):
        try:
            _check_file(path)
            with safe_open(path, framework="pt") as file:
                yield file, _checked_info(file)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ContainerError(
                f"can't be read ({reason}); check the path and its mode"
            ) from error
        except SafetensorError as error:
            raise ContainerError(f"{_kind(path)} ({_one_line(error)}); {_AGAIN}") from error


@contextlib.contextmanager
def _located(path: Path) -> Iterator[None]:
    try:
        yield
    except (ContainerError, TensorError) as error:
        raise type(error)(f"{path}: {error}") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ContainerError("there is no such file; check the path")
    if not path.is_file():
        raise ContainerError("is not a file; give the path of a container (.safetensors)")


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty"
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return "is a zip or pickle file (torch.save?), which vqbench never loads"
    return "is truncated, damaged or no container"


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _checked_info(file: Any) -> ContainerInfo:
    """The file's description, once every tensor in its header has the shape and dtype it implies.

    Shapes in the header are bounded by the file's size, so those of the description are too.
    """
    info = from_header(file.metadata())
    present, expected = set(file.keys()), set()
    described = []
    for tensor in info.tensors:
        where = f"tensor {tensor.name!r}"
        try:
            check_shape(tensor.spec, tensor.n, tensor.k)
        except VqError as error:
            raise ContainerError(f"{where}: {error}; {_AGAIN}") from error
        table = _stored_table(tensor.spec, tensor.n, tensor.k, bias=tensor.bias)
        if set(tensor.checksums) != set(table):
            raise ContainerError(f"{where}: its parts don't go with its format; {_AGAIN}")
        keys = {f"{tensor.name}/{part}": entry for part, entry in table.items()}
        if absent := sorted(set(keys) - present):
            raise ContainerError(f"{where}: {absent[0]!r} is missing; {_AGAIN}")
        for key, entry in keys.items():
            _check_header(file, key, entry, where)
        expected |= set(keys)
        size = sum(entry.numel * entry.dtype.itemsize for entry in table.values())
        described.append(dataclasses.replace(tensor, stored_bytes=size))
    if extra := sorted(present - expected):
        raise ContainerError(f"{extra[0]!r} belongs to no tensor of the description; {_AGAIN}")
    return dataclasses.replace(info, tensors=tuple(described))


def _check_header(file: Any, key: str, entry: Part, where: str) -> None:
    found = file.get_slice(key)
    shape, dtype = tuple(found.get_shape()), str(found.get_dtype())
    if shape != entry.shape or dtype != _DTYPES[entry.dtype]:
        raise ContainerError(
            f"{where}: {key.rpartition('/')[2]} is {dtype} {list(shape)}, but the format needs "
            f"{_DTYPES[entry.dtype]} {list(entry.shape)}; {_AGAIN}"
        )


def _read(file: Any, info: TensorInfo, *, decoded: bool) -> QuantizedTensor:
    where = f"tensor {info.name!r}"
    table = part_table(info.spec, info.n, info.k, bias=info.bias)
    parts = {}
    for part in table:
        # a copy: what is checked here is what is used, whatever becomes of the mapped file
        parts[part] = file.get_tensor(f"{info.name}/{part}").clone()
        if _sha256(parts[part]) != info.checksums[part]:
            raise ContainerError(f"{where}: {part} doesn't match its checksum; {_AGAIN}")
    parts["codes"] = _unpack(parts["codes"], info.spec, table["codes"], where)
    tensor = QuantizedTensor(info.spec, info.n, info.k, parts)
    tensor.validate(where)
    if decoded and _decoded_sha256(tensor, where) != info.decoded_checksum:
        raise ContainerError(
            f"{where}: the dequantised values don't match their checksum; "
            f"the writer and this build decode differently: report it with both versions"
        )
    return tensor


# ------------------------------------------------------------------------------------------------
# checksums


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _decoded_sha256(tensor: QuantizedTensor, where: str) -> str:
    """SHA-256 of the stored weight in float32, taken over pieces of rows to bound memory."""
    cut = row_step(tensor.spec)
    if min(cut, tensor.n) * tensor.k > _MAX_PIECE:
        raise TensorError(
            f"{where}: groups of {cut} rows and {tensor.k} columns are too large to check; "
            f"use a smaller group_size"
        )
    step = cut * math.ceil(_PIECE / (cut * tensor.k))
    digest = hashlib.sha256()
    for start in range(0, tensor.n, step):
        rows = tensor.rows(start, min(start + step, tensor.n))
        values = rows.stored_weight(torch.float64).to(torch.float32).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise TensorError(f"{where}: dequantises to infinity; check scales and coefficients")
        digest.update(_bytes(values))
    return digest.hexdigest()
