"""What a conversion reads: sources of quantised matrices, seen through a selection."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vqkernels.container import Container
from vqkernels.container.checksums import raw_bytes
from vqkernels.container.origin import Made
from vqkernels.dense import DENSE_FILE, open_dense
from vqkernels.errors import ContainerError
from vqkernels.formats import Checkpoint, CheckpointSource
from vqkernels.formats.checkpoint import CONFIG
from vqkernels.formats.tensor_files import read_json
from vqkernels.parallel import ParallelSource
from vqkernels.source import Outline, TensorSource
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "Traversal",
    "View",
    "checkpoint_bytes",
    "chosen",
    "digest_of",
    "is_whole_model",
    "model_of",
    "provenance_of",
    "stored_bytes",
]

Traversal = Literal["row", "column"]

# What says how codes were found or lie in a file: no weight depends on it, and others' formats
# have no place for it.
_TOLD = ("method", "distance", "traversal", "code_bits")


class View(TensorSource):
    """Some matrices of a source, their codes in the order that `traversal` says (None: as it was).

    on_read is called with a name each time a matrix was read; digests: of each, as it was then.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Collection[str],
        *,
        traversal: Traversal | None = None,
        on_read: Callable[[str], None] | None = None,
    ) -> None:
        self.source, self._names = source, dict.fromkeys(names)
        self._traversal, self._on_read = traversal, on_read
        self.digests: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def outline(self, name: str) -> Outline:
        """What the source says, in the order of codes that is asked for."""
        outline = self.source.outline(name)
        return Outline(spec=self._turned(outline.spec), n=outline.n, k=outline.k, bias=outline.bias)

    def __getitem__(self, name: str) -> QuantizedTensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self.source[name]
        tensor = dataclasses.replace(tensor, spec=self._turned(tensor.spec))
        self.digests[name] = digest_of(tensor)
        if self._on_read:
            self._on_read(name)
        return tensor

    @property
    def made(self) -> dict[str, Made]:
        """How each matrix was made, where the source says so."""
        source = self.source.ranks[0] if isinstance(self.source, ParallelSource) else self.source
        found = {name: getattr(source.outline(name), "made", None) for name in self}
        return {name: made for name, made in found.items() if made}

    def _turned(self, spec: CodebookSpec) -> CodebookSpec:
        if self._traversal is None:
            return spec
        return dataclasses.replace(spec, traversal=self._traversal)


def chosen(source: TensorSource, patterns: Sequence[str]) -> list[str]:
    """Names of the matrices that match one of `patterns`; all, without any.

    Raises ContainerError for a pattern that matches none.
    """
    names = list(source)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ContainerError(
                f"no tensor matches {pattern!r}; there are {', '.join(names[:3])}{more}"
            )
    return [
        name
        for name in names
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def is_whole_model(source: TensorSource) -> bool:
    """Whether what `source` comes from holds more than quantised matrices: a model's rest."""
    return isinstance(source, CheckpointSource) or (
        isinstance(source, Container) and (source.path.parent / DENSE_FILE).is_file()
    )


def model_of(source: TensorSource) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
    """The config and the dense tensors of the model that `source` is part of, where they are."""
    if isinstance(source, CheckpointSource):
        return source.checkpoint.config, source.checkpoint.tensors(source.dense_keys())
    if isinstance(source, Container) and is_whole_model(source):
        folder = source.path.parent
        return read_json(folder / CONFIG), open_dense(folder)
    return None


def provenance_of(source: TensorSource) -> dict[str, str]:
    """Where a source says that it comes from."""
    told: object = source.ranks[0] if isinstance(source, ParallelSource) else source
    return dict(getattr(getattr(told, "info", told), "provenance", {}))


def stored_bytes(source: TensorSource, name: str) -> int | None:
    """Bytes that matrix `name` takes where it lies; None where that can't be told."""
    if isinstance(source, ParallelSource):
        shares = [stored_bytes(rank, name) for rank in source.ranks]
        return sum(share or 0 for share in shares)
    if isinstance(source, CheckpointSource):
        keys = source.checkpoint.keys()
        return checkpoint_bytes(source.checkpoint, [k for k in keys if k.startswith(f"{name}.")])
    return getattr(source.outline(name), "stored_bytes", None)


def checkpoint_bytes(checkpoint: Checkpoint, keys: Collection[str]) -> int:
    """Bytes of the tensors `keys` of a checkpoint."""
    return sum(math.prod(checkpoint.shape(key)) * checkpoint.dtype(key).itemsize for key in keys)


def digest_of(tensor: QuantizedTensor) -> str:
    """SHA-256 of all that the weights of `tensor` depend on."""
    fields = {name: v for name, v in tensor.spec.to_dict().items() if name not in _TOLD}
    digest = hashlib.sha256(json.dumps([tensor.n, tensor.k, fields]).encode())
    for part in sorted(tensor.parts):  # their shapes are the format's
        digest.update(raw_bytes(tensor.parts[part].detach().to("cpu").contiguous()))
    return digest.hexdigest()
