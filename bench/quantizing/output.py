"""The finished layers of a job as one container, or as shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import click

from bench.quantizing.job import Job
from bench.quantizing.work import WorkFolder
from vqkernels.atomic import explained, sync_folder
from vqkernels.container.join import join, join_shards
from vqkernels.errors import ContainerError, UnsupportedError
from vqkernels.parts import check_fit, effective_bits
from vqkernels.spec import CodebookSpec

__all__ = ["check_space", "target_of", "write"]


def target_of(folder: Path, name: str, model: Path, *, shards: bool) -> Path:
    """What to write; refused early where that can't work, before hours are spent."""
    if Path(name).name != name or not name.isprintable():
        raise click.BadParameter(f"{name!r} is no file name", param_hint="--name")
    target = folder / (f"{name}.vq" if shards else f"{name}.vq.safetensors")
    there = _standing(folder)
    if not there.is_dir():
        raise ContainerError(f"{there}: is a file; name a folder for the output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ContainerError(f"{there}: can't be written to; choose another folder")
    if target.exists() and (target.resolve() in (model.resolve(), *model.resolve().parents)):
        raise ContainerError(f"{target}: is the model itself; choose another --name or folder")
    if target.exists() and target.is_dir() != shards:
        kind = "a folder" if target.is_dir() else "a file"
        raise ContainerError(f"{target}: is {kind} already; choose another --name or folder")
    return target


def check_space(
    job: Job, shapes: Mapping[str, tuple[int, ...]], work: WorkFolder, folder: Path
) -> None:
    """Raise ContainerError where the disk is too small for what is to come: layers and output."""
    sizes = {name: _size_bytes(spec, *shapes[name]) for name, spec in job.formats.items()}
    need = sum(sizes.values()) + sum(s for name, s in sizes.items() if name not in work.layers)
    there = _standing(folder)
    have = shutil.disk_usage(there).free
    if need > have:
        raise ContainerError(
            f"{there}: needs {need:,} bytes, but its disk has {have:,} left; free some space or "
            f"choose another disk"
        )


def write(
    target: Path, work: WorkFolder, provenance: Mapping[str, str], shard_bytes: int | None
) -> None:
    """Write the finished layers to `target`, whole or not at all, and forget them."""
    files = [layer.file for layer in work.finished]
    if shard_bytes is not None:
        join_shards(target, files, shard_bytes=shard_bytes, provenance=provenance)
    else:
        # in the work folder first: what a killed process leaves there, the next one removes
        made = work.path / "output"
        join(made, files, provenance=provenance)
        with explained(target):
            made.replace(target)
        sync_folder(target.parent)
    work.clear()


def _size_bytes(spec: CodebookSpec, n: int, k: int) -> int:
    """Of a layer; 0 for one that can't hold the format, which will be refused."""
    try:
        check_fit(spec, n, k)
    except UnsupportedError:
        return 0
    bits = effective_bits([(spec, n, k)])
    return (bits.index + bits.codebook + bits.side) // 8


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
