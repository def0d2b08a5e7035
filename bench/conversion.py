"""Quantised matrices from one layout to another, one at a time, and read back afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.sources import View, digest_of, model_of, stored_bytes
from vqkernels import container
from vqkernels.atomic import staged
from vqkernels.container.checksums import raw_bytes
from vqkernels.container.index import INDEX
from vqkernels.container.manifest import Coding
from vqkernels.container.shards import save_shards
from vqkernels.dense import DENSE_CHECKSUM, DENSE_FILE, DenseFile
from vqkernels.errors import ContainerError
from vqkernels.formats import CheckpointSource, aqlm, open_source, plain, vptq
from vqkernels.formats.checkpoint import CONFIG
from vqkernels.formats.npz import save_npz
from vqkernels.formats.write_checkpoint import SHARD_BYTES, dense_group, write_file
from vqkernels.parallel import MAPPING, SplitAxis, axis_of, save_parallel
from vqkernels.source import TensorSource

__all__ = [
    "Kind",
    "Layout",
    "check_target",
    "progress",
    "size_bytes",
    "store",
]

Kind = Literal["container", "shards", "model", "parallel", "npz", "plain", "vptq", "aqlm"]

# A folder with one of these holds quantised matrices, and may be replaced as a whole.
_MARKERS = (plain.INDEX, MAPPING, INDEX, CONFIG)

# Beside a checkpoint's tensors, by glob: what transformers needs to run the model. No code.
_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "*processor_config.json",
)


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


def check_target(source: Path, target: Path, *, force: bool) -> None:
    """Raise ContainerError where writing to `target` would lose `source`, or something else."""
    if target.name in ("", ".."):
        raise ContainerError(f"{target}: is no name for something new; give one")
    if not target.exists() and not target.is_symlink():
        return
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise ContainerError(f"{target}: is what is read, or holds it; choose another name")
    if target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise ContainerError(f"{target}: is there already; choose another name, or add --force")
    if target.is_dir() and not any((target / marker).is_file() for marker in _MARKERS):
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
        if set(written) != set(view):
            different = min(set(written) ^ set(view))
            raise ContainerError(f"{made}: tensor {different!r} is missing or too many; report it")
        if verify:
            for name in _compared(view, written, made):
                verify(name)
            if layout.kind == "model":
                _compare_dense(view, made)
        return {name: stored_bytes(written, name) for name in view}


def _compared(view: View, written: TensorSource, where: Path) -> Iterator[str]:
    """The names, one after the other, of matrices that read back as they were."""
    for name in view:
        if digest_of(written[name]) != view.digests.get(name):
            raise ContainerError(
                f"{where}: tensor {name!r} doesn't read back as it was; report it, with its format"
            )
        yield name


def _compare_dense(view: View, folder: Path) -> None:
    assert isinstance(view.source, CheckpointSource)
    written = DenseFile(folder / DENSE_FILE)
    for key, value in view.source.checkpoint.tensors(view.source.dense_keys()).items():
        found = written[key]
        same = (found.shape, found.dtype) == (value.shape, value.dtype)
        if not same or raw_bytes(found.contiguous()) != raw_bytes(value.contiguous()):
            raise ContainerError(
                f"{folder}: dense tensor {key!r} doesn't read back as it was; report it"
            )


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


def _write_shards(path: Path, view: View, layout: Layout, origin: Mapping[str, str]) -> None:
    save_shards(
        path,
        view,
        shard_bytes=layout.shard_bytes,
        provenance=origin,
        made=view.made,
        codes=layout.codes,
    )


def _write_model(path: Path, view: View, layout: Layout, origin: Mapping[str, str]) -> None:
    """Shards, and beside them what else the checkpoint has: dense tensors, config, tokenizer."""
    assert isinstance(view.source, CheckpointSource)
    checkpoint = view.source.checkpoint
    dense = checkpoint.tensors(view.source.dense_keys())
    path.mkdir()
    write_file(path / DENSE_FILE, [dense_group(dense, key) for key in dense])
    with (path / DENSE_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write_shards(path, view, layout, {**origin, DENSE_CHECKSUM: digest})
    for name in _carried(checkpoint.folder):
        shutil.copyfile(checkpoint.folder / name, path / name)


def _carried(folder: Path) -> list[str]:
    """Files of a checkpoint that go with it: its config and its tokenizer."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, glob) for glob in _CARRIED)
    )


def _write_parallel(path: Path, view: View, layout: Layout, origin: Mapping[str, str]) -> None:
    save_parallel(
        path,
        view,
        ranks=layout.ranks,
        axis_of=layout.axis_of,
        provenance=origin,
        made=view.made,
        codes=layout.codes,
    )


def _write_npz(path: Path, view: View, _: Layout, origin: Mapping[str, str]) -> None:
    save_npz(path, view, provenance=origin, made=view.made)


def _write_plain(path: Path, view: View, _: Layout, origin: Mapping[str, str]) -> None:
    plain.save_plain(path, view, provenance=origin, made=view.made)


def _write_checkpoint(path: Path, view: View, layout: Layout, _: Mapping[str, str]) -> None:
    export = vptq.export if layout.kind == "vptq" else aqlm.export
    config, dense = model_of(view.source) or (None, None)
    export(path, view, config=config, dense=dense, shard_bytes=layout.shard_bytes)


_WRITERS: dict[Kind, Callable[[Path, View, Layout, Mapping[str, str]], None]] = {
    "container": _write_container,
    "shards": _write_shards,
    "model": _write_model,
    "parallel": _write_parallel,
    "npz": _write_npz,
    "plain": _write_plain,
    "vptq": _write_checkpoint,
    "aqlm": _write_checkpoint,
}
