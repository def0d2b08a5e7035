"""What an .npz file and a folder of plain files say of themselves: one JSON object.

    format, version: "vqbench-npz" or "vqbench-plain", and 1
    spec_version: of the specs' fields
    byte_order: "little"
    provenance: strings by name
    tensors: a list of
        name, n, k, bias (true if one is stored), spec (the fields of CodebookSpec)
        made: how the matrix was made (see `container.origin`); missing where nothing is known
        parts: by name, in `part_table`'s order: dtype, shape, sha256 of the bytes, and for plain
            files the name of the file
    sha256: of all the rest, as JSON with sorted keys, no spaces, and non-ASCII characters escaped

Nothing in it is believed: dtypes and shapes must be those that the spec implies, and whoever
reads a part compares them with what there is before anything is allocated.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vqkernels.container.checksums import raw_bytes, sha256
from vqkernels.container.manifest import check_name, outline_in, strings
from vqkernels.container.origin import Made, check_made, checked_provenance, frozen_made
from vqkernels.container.signed import MAX_TEXT, field, json_object
from vqkernels.errors import ContainerError, VqError
from vqkernels.parts import Part, check_shape
from vqkernels.source import Outline, TensorSource, outline_of
from vqkernels.spec import SPEC_VERSION
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "AGAIN",
    "DescribedPart",
    "DescribedSource",
    "DescribedTensor",
    "Description",
    "Writer",
    "parse",
    "read_exactly",
    "readable",
    "stored_parts",
]

VERSION = 1
AGAIN = "copy it again from its source, or make it again with `vqbench convert`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedPart:
    """One stored part: the SHA-256 of its bytes, and its file's name where it has its own."""

    checksum: str
    file: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedTensor(Outline):
    """One matrix: its parts by name, and how it was made (see `container.origin`)."""

    name: str
    parts: Mapping[str, DescribedPart]
    made: Made = dataclasses.field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its parts: they lie as they are in memory."""
        return self.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """All of it."""

    provenance: Mapping[str, str]
    tensors: tuple[DescribedTensor, ...]


class DescribedSource(TensorSource):
    """Matrices that a Description lists; `path` is what errors name.

    provenance: strings by name: where they come from.
    """

    def __init__(self, path: Path, description: Description) -> None:
        self.path = path
        self.provenance = description.provenance
        self._tensors = {tensor.name: tensor for tensor in description.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def outline(self, name: str) -> DescribedTensor:
        """What the description says of matrix `name`."""
        return self._tensors[name]

    def __getitem__(self, name: str) -> QuantizedTensor:
        tensor = self._tensors[name]
        where, parts = f"{self.path}: tensor {name!r}", {}
        for part, entry in tensor.table().items():
            try:
                with readable():
                    parts[part] = self._read(tensor, part, entry)
            except ContainerError as error:
                raise ContainerError(f"{where}: {part} {error}") from error
            if sha256(parts[part]) != tensor.parts[part].checksum:
                raise ContainerError(f"{where}: {part} doesn't match its checksum; {AGAIN}")
        found = QuantizedTensor(tensor.spec, tensor.n, tensor.k, parts)
        found.validate(where)
        return found

    @abc.abstractmethod
    def _read(self, tensor: DescribedTensor, part: str, entry: Part) -> Tensor:
        """`part` with the dtype and shape of `entry`; what is wrong with it as ContainerError."""


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """What the system says of a file that can't be read, as a ContainerError."""
    try:
        yield
    except OSError as error:
        raise ContainerError(
            f"can't be read ({error.strerror or error}); check the path and its mode"
        ) from error


def read_exactly(file: IO[bytes], entry: Part) -> Tensor:
    """The next bytes of `file` as a tensor. Raises ContainerError where the file ends early."""
    value = torch.empty(entry.shape, dtype=entry.dtype)
    rest = raw_bytes(value)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]  # IO forgot it
        if not count:
            raise ContainerError(f"ends {len(rest):,} bytes early; {AGAIN}")
        rest = rest[count:]
    return value


def stored_parts(name: str, tensor: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
    """Parts of a valid `tensor`, on the CPU and contiguous, in the order of storage."""
    tensor.validate(f"tensor {name!r}")
    outline = Outline(spec=tensor.spec, n=tensor.n, k=tensor.k, bias=tensor.bias is not None)
    for part in outline.table():
        yield part, tensor.parts[part].detach().to("cpu").contiguous()


# ------------------------------------------------------------------------------------------------
# writing


class Writer:
    """Collects what is stored, for the description that is written last.

    need: bytes of all parts of the source. Raises ContainerError for no tensors, or a bad name.
    """

    def __init__(
        self,
        kind: str,
        source: Mapping[str, QuantizedTensor],
        provenance: Mapping[str, str] | None,
        made: Mapping[str, Made] | None,
    ) -> None:
        if not source:
            raise ContainerError("no tensors to save; name one at least")
        for name in source:
            check_name(name)
        self._kind, self._made = kind, dict(made or {})
        self._origin = checked_provenance(provenance)
        if strange := sorted(set(self._made) - set(source)):
            raise ContainerError(f"made is of {strange[0]!r}, which is no tensor; check the name")
        self.need = sum(outline_of(source, name).nbytes for name in source)
        self._tensors: list[dict[str, Any]] = []

    def begin(self, name: str, tensor: QuantizedTensor) -> None:
        """What follows are the parts of `tensor`."""
        made = self._made.get(name, {})
        try:
            check_made(made)
        except ContainerError as error:
            raise ContainerError(f"tensor {name!r}: {error}; leave it out or correct it") from error
        self._tensors.append(
            {
                "name": name,
                "n": tensor.n,
                "k": tensor.k,
                "bias": tensor.bias is not None,
                "spec": tensor.spec.to_dict(),
                **({"made": dict(made)} if made else {}),
                "parts": {},
            }
        )

    def add(self, part: str, value: Tensor, file: str = "") -> None:
        """`part` of the tensor that was begun last is `value`, in `file`."""
        entry = {"dtype": _dtype_name(value.dtype), "shape": list(value.shape)}
        named = {"file": file} if file else {}
        self._tensors[-1]["parts"][part] = {**named, **entry, "sha256": sha256(value)}

    def text(self) -> bytes:
        """The description. Raises ContainerError where `parse` would refuse its length."""
        content: dict[str, Any] = {
            "format": self._kind,
            "version": VERSION,
            "spec_version": SPEC_VERSION,
            "byte_order": "little",
            "provenance": self._origin,
            "tensors": self._tensors,
        }
        content["sha256"] = _digest(content)
        text = json.dumps(content, indent=1).encode()
        if len(text) > MAX_TEXT:
            raise ContainerError(
                f"the description takes {len(text):,} bytes of at most {MAX_TEXT:,}; "
                f"store fewer tensors at once"
            )
        return text


# ------------------------------------------------------------------------------------------------
# reading


def parse(content: bytes, kind: str) -> Description:
    """The description in `content`. Raises ContainerError for anything but what Writer makes."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ContainerError(f"the description is not JSON ({error}); {AGAIN}") from error
    fields = json_object(text)
    if fields.get("format") != kind:
        raise ContainerError(f"the description is of no {kind} set; {AGAIN}")
    _check_digest(fields)
    for name, known in (("version", VERSION), ("spec_version", SPEC_VERSION)):
        if (found := field(fields, name, int, "the description")) != known:
            raise ContainerError(
                f"{name} is {found}, but this build reads {known}; "
                f"upgrade vqbench (pip install -U vqbench)"
            )
    if fields.get("byte_order") != "little":
        raise ContainerError("byte_order is not 'little'; swap the bytes and write that")
    entries = field(fields, "tensors", list, "the description")
    tensors = tuple(_tensor(entry) for entry in entries)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ContainerError(f"two tensors have the same name; {AGAIN}")
    return Description(provenance=strings(fields, "provenance", "the description"), tensors=tensors)


def _check_digest(fields: dict[str, Any]) -> None:
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    # 1e999 reads as infinity, which is no JSON to write
    with contextlib.suppress(ValueError, RecursionError):
        if _digest(rest) == fields.get("sha256"):
            return
    raise ContainerError(f"the description doesn't match its checksum; {AGAIN}")


def _tensor(entry: Any) -> DescribedTensor:
    name, outline = outline_in(entry)
    where = f"tensor {name!r}"
    try:
        check_shape(outline.spec, outline.n, outline.k)
        check_made(made := entry.get("made", {}))
    except VqError as error:
        raise ContainerError(f"{where}: {error}; {AGAIN}") from error
    table, parts = outline.table(), field(entry, "parts", dict, where)
    if set(parts) != set(table):
        raise ContainerError(f"{where}: its parts don't go with its format; {AGAIN}")
    found = {part: _part(parts[part], table[part], f"{where}: {part}") for part in table}
    return DescribedTensor(
        name=name,
        spec=outline.spec,
        n=outline.n,
        k=outline.k,
        bias=outline.bias,
        parts=found,
        made=frozen_made(made),
    )


def _part(entry: object, expected: Part, where: str) -> DescribedPart:
    if not isinstance(entry, dict):
        raise ContainerError(f"{where} is described by something else than an object; {AGAIN}")
    needs = {"dtype": _dtype_name(expected.dtype), "shape": list(expected.shape)}
    for fact, need in needs.items():
        if entry.get(fact) != need:
            raise ContainerError(f"{where}: its {fact} should be {need}; {AGAIN}")
    checksum, file = field(entry, "sha256", str, where), entry.get("file", "")
    if not re.fullmatch("[0-9a-f]{64}", checksum) or not isinstance(file, str):
        raise ContainerError(f"{where}: its checksum or file's name can't be; {AGAIN}")
    return DescribedPart(checksum=checksum, file=file)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
