"""Writing containers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vqkernels.atomic import write_atomically
from vqkernels.container.checksums import decoded_sha256, sha256
from vqkernels.container.codes import store_codes
from vqkernels.container.layout import lay_out
from vqkernels.container.manifest import (
    CONTAINER_VERSION,
    Coding,
    ContainerInfo,
    TensorInfo,
    check_name,
    located,
    to_header,
)
from vqkernels.container.origin import Made, check_made, checked_provenance, frozen_made
from vqkernels.container.stored import stored_table
from vqkernels.errors import ContainerError
from vqkernels.source import Outline
from vqkernels.spec import SPEC_VERSION
from vqkernels.tensor import QuantizedTensor

__all__ = ["Prepared", "check_tensors", "prepare", "prepare_all", "save", "serialise"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A matrix on its way to a file: what the manifest says of it, and its stored parts."""

    info: TensorInfo
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts."""
        return sum(self.info.part_bytes.values())


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedTensor],
    *,
    provenance: Mapping[str, str] | None = None,
    made: Mapping[str, Made] | None = None,
    usage: bool = True,
    codes: Coding = "packed",
) -> None:
    """Write `tensors` to `path`, whole or not at all; a file already there is replaced.

    tensors: by name; each is looked up once, so a source that reads them lazily is read once.
    provenance, made: of the file, and of some of its matrices, as `origin` says; the vqbench
        version is added as `creator`.
    usage: whether to store how often each entry is used.
    codes: `ans` codes each stage by ANS where that makes the file smaller, and needs the package
        constriction.

    Equal arguments give equal bytes. Raises TensorError for an invalid tensor, ContainerError
    where the file can't be written, and BackendError for `ans` without constriction; then nothing
    is left, and what was there is untouched.
    """
    path = Path(path)
    matrices = list(prepare_all(path, tensors, made=made, usage=usage, codes=codes))
    with located(path):
        pieces = serialise(matrices, checked_provenance(provenance))
    write_atomically(path, pieces)


def prepare_all(
    path: Path,
    tensors: Mapping[str, QuantizedTensor],
    *,
    made: Mapping[str, Made] | None,
    usage: bool,
    codes: Coding,
) -> Iterator[Prepared]:
    """Each of `tensors`, looked up once, as `prepare` gives it; errors of ours name `path`."""
    made = dict(made or {})
    with located(path):
        check_tensors(tensors, made)
    for name, tensor in tensors.items():
        with located(path):
            prepared = prepare(name, tensor, made=made.get(name), usage=usage, codes=codes)
        yield prepared


def check_tensors(tensors: Mapping[str, QuantizedTensor], made: Mapping[str, Made]) -> None:
    """Raise ContainerError where there are none, or `made` is of another one; none is read."""
    if not tensors:
        raise ContainerError("no tensors to save; name one at least")
    if strange := sorted(set(made) - set(tensors)):
        raise ContainerError(f"made is of {strange[0]!r}, which is no tensor; check the name")


def prepare(
    name: str,
    tensor: QuantizedTensor,
    *,
    made: Made | None = None,
    usage: bool = True,
    codes: Coding = "packed",
) -> Prepared:
    """`tensor` checked, coded and summed; options and errors as for `save`."""
    check_name(name)
    where = f"tensor {name!r}"
    try:
        check_made(made or {})
    except ContainerError as error:
        raise ContainerError(f"{where}: {error}; leave it out or correct it") from error
    tensor.validate(where)
    cpu = tensor.to("cpu")
    parts = {part: value.detach().contiguous() for part, value in cpu.parts.items()}
    outline = Outline(spec=tensor.spec, n=tensor.n, k=tensor.k, bias="bias" in parts)
    coding, coded = store_codes(parts.pop("codes"), outline, usage=usage, ans=codes == "ans")
    parts |= coded
    info = TensorInfo(
        name=name,
        spec=tensor.spec,
        n=tensor.n,
        k=tensor.k,
        bias=outline.bias,
        coding=coding,
        usage=usage,
        made=frozen_made(made or {}),
        checksums={},
        decoded_checksum=decoded_sha256(cpu, where),
    )
    table = stored_table(info)
    for part, entry in table.items():
        assert entry.fits(tuple(parts[part].shape), parts[part].dtype), (part, entry)
    info = dataclasses.replace(
        info,
        checksums={part: sha256(parts[part]) for part in table},
        part_bytes={part: parts[part].nbytes for part in table},
    )
    return Prepared(info, {part: parts[part] for part in table})


def serialise(
    matrices: Sequence[Prepared],
    provenance: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
) -> list[bytes | memoryview]:
    """The bytes of a file of `matrices`, in pieces.

    extra: more fields of the description. Raises ContainerError where that is too long.
    """
    info = ContainerInfo(
        version=CONTAINER_VERSION,
        spec_version=SPEC_VERSION,
        provenance=provenance,
        tensors=tuple(matrix.info for matrix in matrices),
        extra=extra or {},
    )
    stored = {
        f"{matrix.info.name}/{part}": value
        for matrix in matrices
        for part, value in matrix.parts.items()
    }
    return lay_out(to_header(info), stored)
