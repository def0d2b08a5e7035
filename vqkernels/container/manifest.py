"""What a container says of itself: the JSON text in its header, written, parsed and checked.

The header of the safetensors file carries two strings: `vqbench`, a JSON object, and
`vqbench_sha256`, the SHA-256 of that text. Those two names and that rule hold for every version,
so that a file from a newer release is told apart from a damaged one. The object:

    container_version, spec_version: whole numbers
    provenance: strings by name (see `origin`)
    tensors: a list of
        name, n, k, bias (true if one is stored), spec (the fields of CodebookSpec)
        coding: of each stage's codes, `packed` or `ans` (see `stored`)
        usage: true if the usage of every stage is stored, false if only that of `ans` stages
        made: how the matrix was made, an object (see `origin`); missing where nothing is known
        sha256: of each stored part's bytes, by part name
        decoded_sha256: of `QuantizedTensor.stored_weight`, rounded from float64 to float32,
            row after row, little-endian

A reader passes over fields that it doesn't know: what changes the meaning of others comes with
another version. Version 1 has no coding (all are packed), no usage (none is stored) and no made.

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
from typing import Any, Literal, NoReturn, TypeVar, get_args

from vqkernels.container.origin import Made, check_made, frozen_made
from vqkernels.errors import BackendError, ContainerError, SpecError, TensorError
from vqkernels.source import Outline
from vqkernels.spec import SPEC_VERSION, CodebookSpec

__all__ = [
    "CONTAINER_VERSION",
    "Coding",
    "ContainerInfo",
    "TensorInfo",
    "check_name",
    "from_header",
    "located",
    "to_header",
]

CONTAINER_VERSION = 2

Coding = Literal["packed", "ans"]

MAX_TEXT = 1 << 25  # 32 MB: 20,000 matrices; safetensors refuses headers above 100 MB
MAX_NUMBER = (1 << 31) - 1  # of n, k and a spec's fields: products of four stay far from 2**1024

_TEXT, _DIGEST = "vqbench", "vqbench_sha256"
_UPGRADE = "upgrade vqbench (pip install -U vqbench)"
_DAMAGED = "it was damaged or edited; copy or make it again"

_FIELDS = ("container_version", "spec_version", "provenance", "tensors")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo(Outline):
    """One matrix of a container.

    coding: how the codes of each stage are stored.
    usage: whether how often each entry is used is stored for every stage.
    made: how the matrix was made (see `origin`).
    checksums: SHA-256 of each stored part, in hexadecimal.
    decoded_checksum: the same of the dequantised matrix (before rotation, scale and zero).
    part_bytes: size of each stored part; empty before the file is looked at.
    """

    name: str
    coding: tuple[Coding, ...]
    usage: bool
    checksums: Mapping[str, str]
    decoded_checksum: str
    made: Made = dataclasses.field(default_factory=dict)
    part_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its parts in the file, without what aligns them."""
        return sum(self.part_bytes.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContainerInfo:
    """What a container holds and where it comes from.

    extra: fields of the description that are none of these, as JSON has them.
    """

    version: int
    spec_version: int
    provenance: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
            "coding": list(tensor.coding),
            "usage": tensor.usage,
            **({"made": dict(tensor.made)} if tensor.made else {}),
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
        **info.extra,
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_TEXT:
        raise ContainerError(
            f"the description takes {len(text):,} bytes of at most {MAX_TEXT:,}; "
            f"use several files, or less provenance"
        )
    return {_TEXT: text, _DIGEST: _sha256(text)}


def from_header(header: Mapping[str, str] | None) -> ContainerInfo:
    """The description in a file's header strings; `part_bytes` is left empty.

    Raises ContainerError, without the file's name, for anything but what `to_header` makes.
    """
    if not header or _TEXT not in header:
        raise ContainerError(
            "a safetensors file, but not a vqbench container; make one with `vqbench quantize`"
        )
    if set(header) != {_TEXT, _DIGEST} or _sha256(header[_TEXT]) != header[_DIGEST]:
        raise ContainerError(f"the description doesn't match its checksum; {_DAMAGED}")
    content = _parse(header[_TEXT])
    version = _version(content, "container_version", CONTAINER_VERSION)
    spec_version = _version(content, "spec_version", SPEC_VERSION)
    provenance = _strings(content, "provenance", "the file")
    entries = _field(content, "tensors", list, "the file")
    tensors = tuple(_tensor(entry, version) for entry in entries)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ContainerError(f"two tensors have the same name; {_DAMAGED}")
    return ContainerInfo(
        version=version,
        spec_version=spec_version,
        provenance=provenance,
        tensors=tensors,
        extra={name: value for name, value in content.items() if name not in _FIELDS},
    )


def _version(content: dict[str, Any], name: str, newest: int) -> int:
    version = _field(content, name, int, "the file")
    if not 1 <= version <= newest:
        known = "1" if newest == 1 else f"1 to {newest}"
        raise ContainerError(
            f"{name} is {version}, but this build reads {known}; "
            f"{_UPGRADE if version > newest else _DAMAGED}"
        )
    return version


def check_name(name: str) -> None:
    """Raise ContainerError for a tensor name that a file or a one-line message can't hold."""
    if not 0 < len(name) <= 1024 or not name.isprintable():
        raise ContainerError(f"{name!r} can't name a tensor; use up to 1024 printable characters")


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Puts the file's name in front of the errors inside."""
    try:
        yield
    except (BackendError, ContainerError, TensorError) as error:
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


def _tensor(entry: object, version: int) -> TensorInfo:
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
    spec = _spec(_field(entry, "spec", dict, where), where)
    return TensorInfo(
        name=name,
        spec=spec,
        n=_side(entry, "n", where),
        k=_side(entry, "k", where),
        bias=_field(entry, "bias", bool, where),
        coding=_coding(entry, spec, where, version),
        usage=version > 1 and _field(entry, "usage", bool, where),
        made=_made(entry, where) if version > 1 else {},
        checksums=checksums,
        decoded_checksum=decoded,
    )


def _coding(
    entry: dict[str, Any], spec: CodebookSpec, where: str, version: int
) -> tuple[Coding, ...]:
    if version == 1:
        return tuple("packed" for _ in spec.stages)
    coding = _field(entry, "coding", list, where)
    if len(coding) != len(spec.stages) or not all(kind in get_args(Coding) for kind in coding):
        raise ContainerError(
            f"{where}: coding should give {' or '.join(get_args(Coding))} for each stage; "
            f"{_DAMAGED}"
        )
    if ("ans", 1) in zip(coding, spec.stages, strict=True):
        raise ContainerError(f"{where}: coding of a stage with one entry can't be ans; {_DAMAGED}")
    return tuple(coding)


def _made(entry: dict[str, Any], where: str) -> Made:
    made = entry.get("made", {})
    try:
        check_made(made)
    except ContainerError as error:
        raise ContainerError(f"{where}: {error}; {_DAMAGED}") from error
    return frozen_made(made)


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
