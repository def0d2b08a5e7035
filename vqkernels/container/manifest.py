"""What a container says of itself: the JSON text in its header, written, parsed and checked.

The header of the safetensors file carries two strings: `vqbench`, a JSON object, and
`vqbench_sha256`, the SHA-256 of that text. Those two names and that rule hold for every version,
so that a file from a newer release is told apart from a damaged one. The object:

    container_version, spec_version: whole numbers
    provenance: strings by name (creator, date, seed, method, ...)
    tensors: a list of
        name, n, k, bias (true if one is stored), spec (the fields of CodebookSpec)
        sha256: of each stored part's bytes, by part name
        decoded_sha256: of `QuantizedTensor.stored_weight`, rounded from float64 to float32,
            row after row, little-endian

Nothing in a file is believed: each field is checked for its type and size, and every shape that
it implies is compared with what the file really holds before anything is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from vqkernels.errors import ContainerError, SpecError, TensorError
from vqkernels.source import Outline
from vqkernels.spec import SPEC_VERSION, CodebookSpec

__all__ = [
    "CONTAINER_VERSION",
    "ContainerInfo",
    "TensorInfo",
    "check_name",
    "from_header",
    "located",
    "to_header",
]

CONTAINER_VERSION = 1

MAX_TEXT = 1 << 25  # 32 MB: 20,000 matrices; safetensors refuses headers above 100 MB
MAX_NUMBER = (1 << 31) - 1  # of n, k and a spec's fields: products of four stay far from 2**1024

_TEXT, _DIGEST = "vqbench", "vqbench_sha256"
_UPGRADE = "upgrade vqbench (pip install -U vqbench)"
_DAMAGED = "it was damaged or edited; copy or make it again"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo(Outline):
    """One matrix of a container.

    stored_bytes: size of its parts in the file, padding included.
    checksums: SHA-256 of each stored part, in hexadecimal.
    decoded_checksum: the same of the dequantised matrix (before rotation, scale and zero).
    """

    name: str
    checksums: Mapping[str, str]
    decoded_checksum: str
    stored_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContainerInfo:
    """What a container holds and where it comes from."""

    version: int
    spec_version: int
    provenance: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]


def to_header(info: ContainerInfo) -> dict[str, str]:
    """The two strings of a file's header that stand for `info`.

    Raises ContainerError where the text is too long for `from_header` to accept.
    """
    tensors = [
        {
            "name": tensor.name,
            "n": tensor.n,
            "k": tensor.k,
            "bias": tensor.bias,
            "spec": tensor.spec.to_dict(),
            "sha256": dict(tensor.checksums),
            "decoded_sha256": tensor.decoded_checksum,
        }
        for tensor in info.tensors
    ]
    content = {
        "container_version": info.version,
        "spec_version": info.spec_version,
        "provenance": dict(info.provenance),
        "tensors": tensors,
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_TEXT:
        raise ContainerError(
            f"the description takes {len(text):,} bytes of at most {MAX_TEXT:,}; "
            f"use several files, or less provenance"
        )
    return {_TEXT: text, _DIGEST: _sha256(text)}


def from_header(header: Mapping[str, str] | None) -> ContainerInfo:
    """The description in a file's header strings; `stored_bytes` is left at 0.

    Raises ContainerError, without the file's name, for anything but what `to_header` makes.
    """
    if not header or _TEXT not in header:
        raise ContainerError(
            "a safetensors file, but not a vqbench container; make one with `vqbench quantize`"
        )
    if set(header) != {_TEXT, _DIGEST} or _sha256(header[_TEXT]) != header[_DIGEST]:
        raise ContainerError(f"the description doesn't match its checksum; {_DAMAGED}")
    content = _parse(header[_TEXT])
    for name, known in (("container_version", CONTAINER_VERSION), ("spec_version", SPEC_VERSION)):
        version = _field(content, name, int, "the file")
        if version != known:
            raise ContainerError(
                f"{name} is {version}, but this build reads {known}; "
                f"{_UPGRADE if version > known else _DAMAGED}"
            )
    provenance = _strings(content, "provenance", "the file")
    tensors = tuple(_tensor(entry) for entry in _field(content, "tensors", list, "the file"))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ContainerError(f"two tensors have the same name; {_DAMAGED}")
    return ContainerInfo(
        version=CONTAINER_VERSION,
        spec_version=SPEC_VERSION,
        provenance=provenance,
        tensors=tensors,
    )


def check_name(name: str) -> None:
    """Raise ContainerError for a tensor name that a file or a one-line message can't hold."""
    if not 0 < len(name) <= 1024 or not name.isprintable():
        raise ContainerError(f"{name!r} can't name a tensor; use up to 1024 printable characters")


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Puts the file's name in front of the errors inside."""
    try:
        yield
    except (ContainerError, TensorError) as error:
        raise type(error)(f"{path}: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _parse(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    if len(text) > MAX_TEXT:
        raise ContainerError(f"a description of {len(text):,} bytes, over {MAX_TEXT:,}; {_DAMAGED}")
    try:
        content = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"the description is not JSON ({error}); {_DAMAGED}") from error
    if not isinstance(content, dict):
        raise ContainerError(f"the description is not a JSON object; {_DAMAGED}")
    return content


def _field(content: dict[str, Any], name: str, kind: type[T], where: str) -> T:
    value = content.get(name)
    # True is an int to Python, and no number to us
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ContainerError(f"{where}: {name} should be a JSON {kind.__name__}; {_DAMAGED}")
    return value


def _strings(content: dict[str, Any], name: str, where: str) -> Mapping[str, str]:
    values = _field(content, name, dict, where)
    if not all(isinstance(value, str) for value in values.values()):
        raise ContainerError(f"{where}: {name} should hold only strings; {_DAMAGED}")
    return MappingProxyType(values)


def _tensor(entry: object) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ContainerError(f"a tensor is described by something else than an object; {_DAMAGED}")
    name = _field(entry, "name", str, "a tensor")
    check_name(name)
    where = f"tensor {name!r}"
    checksums = _strings(entry, "sha256", where)
    decoded = _field(entry, "decoded_sha256", str, where)
    for digest in (*checksums.values(), decoded):
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ContainerError(f"{where}: a checksum is no SHA-256; {_DAMAGED}")
    return TensorInfo(
        name=name,
        spec=_spec(_field(entry, "spec", dict, where), where),
        n=_side(entry, "n", where),
        k=_side(entry, "k", where),
        bias=_field(entry, "bias", bool, where),
        checksums=checksums,
        decoded_checksum=decoded,
    )


def _side(entry: dict[str, Any], name: str, where: str) -> int:
    value = _field(entry, name, int, where)
    if not 1 <= value <= MAX_NUMBER:
        raise ContainerError(f"{where}: {name} is {value}, not 1 to {MAX_NUMBER}; {_DAMAGED}")
    return value


def _spec(fields: dict[str, Any], where: str) -> CodebookSpec:
    for name, value in fields.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number > MAX_NUMBER for number in numbers):
            raise ContainerError(f"{where}: {name} is over {MAX_NUMBER}; {_DAMAGED}")
    try:
        return CodebookSpec.from_dict(fields)
    except SpecError as error:
        raise ContainerError(f"{where}: {error}") from error
