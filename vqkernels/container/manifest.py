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
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from vqkernels.container.origin import Made, check_made, frozen_made
from vqkernels.container.signed import DAMAGED, DIGEST, TEXT, check_version, field, sign, signed
from vqkernels.errors import BackendError, ContainerError, SpecError, TensorError
from vqkernels.source import Outline
from vqkernels.spec import SPEC_VERSION, CodebookSpec

__all__ = [
    "CONTAINER_VERSION",
    "Coding",
    "ContainerInfo",
    "TensorInfo",
    "check_name",
    "checksums_in",
    "from_header",
    "located",
    "outline_in",
    "strings",
    "to_header",
]

CONTAINER_VERSION = 2

Coding = Literal["packed", "ans"]

MAX_NUMBER = (1 << 31) - 1  # of n, k and a spec's fields: products of four stay far from 2**1024

_FIELDS = ("container_version", "spec_version", "provenance", "tensors")


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
    digest: SHA-256 of the description, and so of all that it gives checksums of; empty before it
        is written.
    """

    version: int
    spec_version: int
    provenance: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""


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
    return sign(content)


def from_header(header: Mapping[str, str] | None) -> ContainerInfo:
    """The description in a file's header strings; `part_bytes` is left empty.

    Raises ContainerError, without the file's name, for anything but what `to_header` makes.
    """
    if not header or TEXT not in header:
        raise ContainerError(
            "a safetensors file, but not a vqbench container; make one with `vqbench quantize`"
        )
    content = signed(header)
    if strange := sorted(set(header) - {TEXT, DIGEST}):
        raise ContainerError(f"the header holds {strange[0]!r} beside the description; {DAMAGED}")
    version = check_version(content, "container_version", CONTAINER_VERSION)
    spec_version = check_version(content, "spec_version", SPEC_VERSION)
    provenance = strings(content, "provenance", "the file")
    entries = field(content, "tensors", list, "the file")
    tensors = tuple(_tensor(entry, version) for entry in entries)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ContainerError(f"two tensors have the same name; {DAMAGED}")
    return ContainerInfo(
        version=version,
        spec_version=spec_version,
        provenance=provenance,
        tensors=tensors,
        extra={name: value for name, value in content.items() if name not in _FIELDS},
        digest=header[DIGEST],
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
    except (BackendError, ContainerError, TensorError) as error:
        raise type(error)(f"{path}: {error}") from error


def strings(content: dict[str, Any], name: str, where: str) -> Mapping[str, str]:
    """`content[name]`, which has to be an object of strings."""
    values = field(content, name, dict, where)
    if not all(isinstance(value, str) for value in values.values()):
        raise ContainerError(f"{where}: {name} should hold only strings; {DAMAGED}")
    return MappingProxyType(values)


def outline_in(entry: object) -> tuple[str, Outline]:
    """The matrix that the fields name, n, k, bias and spec of `entry` describe, and its name.

    Raises ContainerError where they don't; whether the shape fits the format isn't looked at.
    """
    if not isinstance(entry, dict):
        raise ContainerError(f"a tensor is described by something else than an object; {DAMAGED}")
    name = field(entry, "name", str, "a tensor")
    check_name(name)
    where = f"tensor {name!r}"
    outline = Outline(
        spec=_spec(field(entry, "spec", dict, where), where),
        n=_side(entry, "n", where),
        k=_side(entry, "k", where),
        bias=field(entry, "bias", bool, where),
    )
    return name, outline


def checksums_in(entry: dict[str, Any], where: str) -> Mapping[str, str]:
    """The SHA-256 by part in field sha256 of `entry`."""
    checksums = strings(entry, "sha256", where)
    for digest in checksums.values():
        _check_sha256(digest, where)
    return checksums


def _tensor(entry: Any, version: int) -> TensorInfo:
    name, outline = outline_in(entry)
    where = f"tensor {name!r}"
    decoded = field(entry, "decoded_sha256", str, where)
    _check_sha256(decoded, where)
    return TensorInfo(
        name=name,
        spec=outline.spec,
        n=outline.n,
        k=outline.k,
        bias=outline.bias,
        coding=_coding(entry, outline.spec, where, version),
        usage=version > 1 and field(entry, "usage", bool, where),
        made=_made(entry, where) if version > 1 else {},
        checksums=checksums_in(entry, where),
        decoded_checksum=decoded,
    )


def _check_sha256(digest: str, where: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ContainerError(f"{where}: a checksum is no SHA-256; {DAMAGED}")


def _coding(
    entry: dict[str, Any], spec: CodebookSpec, where: str, version: int
) -> tuple[Coding, ...]:
    if version == 1:
        return tuple("packed" for _ in spec.stages)
    coding = field(entry, "coding", list, where)
    if len(coding) != len(spec.stages) or not all(kind in get_args(Coding) for kind in coding):
        raise ContainerError(
            f"{where}: coding should give {' or '.join(get_args(Coding))} for each stage; {DAMAGED}"
        )
    if ("ans", 1) in zip(coding, spec.stages, strict=True):
        raise ContainerError(f"{where}: coding of a stage with one entry can't be ans; {DAMAGED}")
    return tuple(coding)


def _made(entry: dict[str, Any], where: str) -> Made:
    made = entry.get("made", {})
    try:
        check_made(made)
    except ContainerError as error:
        raise ContainerError(f"{where}: {error}; {DAMAGED}") from error
    return frozen_made(made)


def _side(entry: dict[str, Any], name: str, where: str) -> int:
    value = field(entry, name, int, where)
    if not 1 <= value <= MAX_NUMBER:
        raise ContainerError(f"{where}: {name} is {value}, not 1 to {MAX_NUMBER}; {DAMAGED}")
    return value


def _spec(fields: dict[str, Any], where: str) -> CodebookSpec:
    for name, value in fields.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number > MAX_NUMBER for number in numbers):
            raise ContainerError(f"{where}: {name} is over {MAX_NUMBER}; {DAMAGED}")
    try:
        return CodebookSpec.from_dict(fields)
    except SpecError as error:
        raise ContainerError(f"{where}: {error}; {DAMAGED}") from error
