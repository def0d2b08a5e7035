"""Quantised matrices from one layout to another, one at a time, and read back afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vqkernels import container
from vqkernels.atomic import staged
from vqkernels.container.checksums import raw_bytes
from vqkernels.container.manifest import Coding
from vqkernels.container.origin import Made
from vqkernels.errors import ContainerError
from vqkernels.formats import Checkpoint, aqlm, open_source, vptq
from vqkernels.formats.npz import save_npz
from vqkernels.formats.plain import save_plain
from vqkernels.parallel import SplitAxis, axis_of
from vqkernels.source import Outline, TensorSource
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "SHARD_BYTES",
    "Imported",
    "Kind",
    "Layout",
    "Traversal",
    "View",
    "check_target",
    "chosen",
    "digest_of",
    "progress",
    "provenance_of",
    "size_bytes",
    "store",
    "stored_bytes",
]

Traversal = Literal["row", "column"]
Kind = Literal["container", "shards", "parallel", "npz", "plain", "vptq", "aqlm"]

SHARD_BYTES = 5_000_000_000  # transformers' own limit of a file

# What says how codes were found or lie in a file: no weight depends on it, and others' formats
# have no place for it.
_TOLD = ("method", "distance", "traversal", "code_bits")

# A folder with one of these holds quantised matrices, and may be replaced as a whole.
_MARKERS = ("layers.json", "parallel.json", "model.safetensors.index.json", "config.json")


@runtime_checkable
class Imported(Protocol):
    """A source that is a model's checkpoint: VPTQ's or AQLM's."""

    checkpoint: Checkpoint

    def dense_keys(self) -> list[str]: ...  # noqa: D102  # as there


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
        found = {name: getattr(self.source.outline(name), "made", None) for name in self}
        return {name: made for name, made in found.items() if made}

    def _turned(self, spec: CodebookSpec) -> CodebookSpec:
        if self._traversal is None:
            return spec
        return dataclasses.replace(spec, traversal=self._traversal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How matrices are to lie.

    codes: packed, or entropy-coded, in containers.
    shard_bytes: of shards, and of the files of a checkpoint.
    ranks, axis_of: for how many to cut, and which way, by name, for tensor parallelism.
    """

    kind: Kind
    codes: Coding = "packed"
    shard_bytes: int = SHARD_BYTES
    ranks: int = 1
    axis_of: Callable[[str], SplitAxis] = axis_of


# ------------------------------------------------------------------------------------------------
# what there is


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


def provenance_of(source: TensorSource) -> dict[str, str]:
    """Where a source says that it comes from."""
    told = getattr(source, "info", source)
    return dict(getattr(told, "provenance", {}))


def stored_bytes(source: TensorSource, name: str) -> int | None:
    """Bytes that matrix `name` takes where it lies; None where that can't be told."""
    if isinstance(source, Imported):
        stored = source.checkpoint
        keys = [key for key in stored.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
        return sum(math.prod(stored.shape(key)) * stored.dtype(key).itemsize for key in keys)
    return getattr(source.outline(name), "stored_bytes", None)


def check_target(source: Path, target: Path, *, force: bool) -> None:
    """Raise ContainerError where writing to `target` would lose `source`, or something else."""
    if target.name in ("", ".."):
        raise ContainerError(f"{target}: is no name for something new; give one")
    if not target.exists() and not target.is_symlink():
        return
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise ContainerError(f"{target}: is what is read, or holds it; choose another name")
    if not force:
        raise ContainerError(f"{target}: is there already; choose another name, or add --force")
    known = any((target / marker).is_file() for marker in _MARKERS)
    if target.is_dir() and any(target.iterdir()) and not known:
        raise ContainerError(
            f"{target}: is a folder of something else than quantised matrices, which is never "
            f"replaced; choose another name"
        )


# ------------------------------------------------------------------------------------------------
# what is to be


def store(
    target: Path,
    view: View,
    layout: Layout,
    provenance: Mapping[str, str],
    *,
    verify: Callable[[str], None] | None,
) -> dict[str, int | None]:
    """Write the matrices of `view` to `target` as `layout` says, whole or not at all.

    With `verify`, which is called with each name, all of them are read back before `target` gets
    its name, and compared with what was read. Returns the bytes that each takes now. Raises
    ContainerError for what doesn't read back as it was, and whatever reading and writing raise.
    """
    with staged(target) as made:
        _WRITERS[layout.kind](made, view, layout, provenance)
        written = open_source(made)
        if verify:
            for name in _compared(view, written, made):
                verify(name)
        return {name: stored_bytes(written, name) for name in written}


def _compared(view: View, written: TensorSource, where: Path) -> Iterator[str]:
    """The names, one after the other, of matrices that read back as they were."""
    if set(written) != set(view):
        different = min(set(written) ^ set(view))
        raise ContainerError(f"{where}: tensor {different!r} is missing or too many; report it")
    for name in view:
        if digest_of(written[name]) != view.digests.get(name):
            raise ContainerError(
                f"{where}: tensor {name!r} doesn't read back as it was; report it, with its format"
            )
        yield name


def digest_of(tensor: QuantizedTensor) -> str:
    """SHA-256 of all that the weights of `tensor` depend on."""
    fields = {name: v for name, v in tensor.spec.to_dict().items() if name not in _TOLD}
    digest = hashlib.sha256(json.dumps([tensor.n, tensor.k, fields]).encode())
    for part, value in sorted(tensor.parts.items()):
        digest.update(f"{part} {value.dtype} {list(value.shape)}".encode())
        digest.update(raw_bytes(value.detach().to("cpu").contiguous()))
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextlib.contextmanager
def progress(count: int) -> Iterator[Callable[[str], Callable[[str], None]]]:
    """Bars on a terminal: given a description, each is to be called `count` times."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bars:

        def begin(description: str) -> Callable[[str], None]:
            task = bars.add_task(description, total=count)
            return lambda _: bars.advance(task)

        yield begin


# ------------------------------------------------------------------------------------------------
# layouts


def _write_container(path: Path, view: View, layout: Layout, origin: Mapping[str, str]) -> None:
    container.save(path, view, provenance=origin, made=view.made, codes=layout.codes)


def _write_npz(path: Path, view: View, _: Layout, origin: Mapping[str, str]) -> None:
    save_npz(path, view, provenance=origin, made=view.made)


def _write_plain(path: Path, view: View, _: Layout, origin: Mapping[str, str]) -> None:
    save_plain(path, view, provenance=origin, made=view.made)


def _write_checkpoint(path: Path, view: View, layout: Layout, _: Mapping[str, str]) -> None:
    export = vptq.export if layout.kind == "vptq" else aqlm.export
    model: dict[str, Any] = {}
    if isinstance(view.source, Imported):
        source = view.source.checkpoint
        model = {"config": source.config, "dense": source.tensors(view.source.dense_keys())}
    export(path, view, **model, shard_bytes=layout.shard_bytes)


_WRITERS: dict[Kind, Callable[[Path, View, Layout, Mapping[str, str]], None]] = {
    "container": _write_container,
    "npz": _write_npz,
    "plain": _write_plain,
    "vptq": _write_checkpoint,
    "aqlm": _write_checkpoint,
}
