"""`vqbench import`: a VPTQ or AQLM checkpoint as a container."""  # noqa: N999  # the command is called so, and loaded by that name

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench.conversion import Layout, check_target, progress, size_bytes, store
from bench.format_text import changed_fields, told
from bench.options import parse_size
from bench.sources import View, checkpoint_bytes
from bench.tables import render
from vqkernels.container.manifest import Coding
from vqkernels.container.origin import library_stamp
from vqkernels.errors import ContainerError, VqError
from vqkernels.formats import CheckpointSource, open_checkpoint
from vqkernels.formats.write_checkpoint import SHARD_BYTES
from vqkernels.parts import effective_bits
from vqkernels.source import TensorSource

__all__ = ["command"]

Row = dict[str, Any]

_COLUMNS = {
    "format": "format",
    "layers": "layers",
    "index": "index",
    "codebook": "codebook",
    "side": "side",
    "bits": "bits/weight",
    "bytes": "bytes",
}


@click.command("import")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", "target", required=True, type=click.Path(path_type=Path))
@click.option(
    "--shard-size", metavar="SIZE", callback=parse_size, help="Of a shard (5GB): 2GB, 500MiB."
)
@click.option("--codes", type=click.Choice(["packed", "ans"]), default="packed", show_default=True)
@click.option("--skip-bad", is_flag=True, help="Leave out modules that can't be read.")
@click.option("--force", is_flag=True, help="Replace what is at OUT.")
@click.option("--verify/--no-verify", default=True, help="Read everything back and compare it.")
def command(
    folder: Path,
    target: Path,
    shard_size: int | None,
    codes: Coding,
    skip_bad: bool,
    force: bool,
    verify: bool,
) -> None:
    """Import DIR, a VPTQ or AQLM checkpoint (config.json, safetensors), bit for bit.

    OUT is a folder: the quantised matrices as a container of shards, every other tensor as it is
    in dense.safetensors, config.json and the tokenizer's files. If OUT is called *.safetensors,
    it is one container with the quantised matrices alone.

    A module that can't be read ends the import. OUT is written whole or not at all, and gets its
    name once every matrix has been read back and found equal.
    """
    whole = target.suffix != ".safetensors"
    if shard_size and not whole:
        raise click.UsageError("--shard-size is of a folder: don't call OUT *.safetensors")
    check_target(folder, target, force=force)
    layout = Layout(
        kind="model" if whole else "container",
        codes=codes,
        shard_bytes=shard_size or SHARD_BYTES,
    )
    try:
        source = open_checkpoint(folder, skip_bad=skip_bad)
        refused = dict(source.refused)
        with progress(len(source)) as begin:
            if skip_bad:
                refused |= _unreadable(source)
            names = [name for name in source if name not in refused]
            if not names:
                raise ContainerError(
                    f"{folder}: no module can be read; {next(iter(refused.values()))}"
                )
            view = View(source, names, on_read=begin("importing"))
            check = begin("comparing") if verify else None
            sizes = store(target, view, layout, _provenance(source), verify=check)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {target} was not written", err=True)
        sys.exit(130)
    click.echo(render(_rows(view, sizes), _COLUMNS, "table").strip("\n"))
    _report(source, refused, whole)
    read_back = "every matrix reads back equal" if verify else "nothing was read back"
    click.echo(f"wrote {target} ({size_bytes(target):,} bytes): {read_back}", err=True)


def _unreadable(source: TensorSource) -> dict[str, str]:
    """Why a module's data can't be read, by name: all are read to find out."""
    refused = {}
    for name in source:
        try:
            source[name]
        except VqError as error:
            refused[name] = str(error)
    return refused


def _provenance(source: CheckpointSource) -> dict[str, str]:
    checkpoint = source.checkpoint
    origin = {
        "source": checkpoint.folder.resolve().name,
        "quant_method": checkpoint.method,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": library_stamp(),
    }
    version = checkpoint.config.get("transformers_version")
    return origin | ({"transformers_version": version} if isinstance(version, str) else {})


# ------------------------------------------------------------------------------------------------
# what is printed


def _rows(view: View, sizes: dict[str, int | None]) -> list[Row]:
    """A row for each format, and one for all of them."""
    formats: dict[str, list[str]] = {}
    for name in view:
        formats.setdefault(told(changed_fields(view.outline(name).spec)), []).append(name)
    groups = [*formats.items(), *([("all", list(view))] if len(formats) > 1 else [])]
    return [_row(view, label, names, sizes) for label, names in groups]


def _row(view: View, label: str, names: list[str], sizes: dict[str, int | None]) -> Row:
    outlines = [view.outline(name) for name in names]
    bits = effective_bits((outline.spec, outline.n, outline.k) for outline in outlines)
    shares = {"index": bits.index, "codebook": bits.codebook, "side": bits.side}
    return {
        "format": label,
        "layers": len(names),
        **{name: f"{count / bits.weights:.4f}" for name, count in shares.items()},
        "bits": f"{bits.per_weight():.4f}",
        "bytes": sum(sizes[name] or 0 for name in names),
    }


def _report(source: CheckpointSource, refused: dict[str, str], whole: bool) -> None:
    dense = source.dense_keys()
    size = checkpoint_bytes(source.checkpoint, dense)
    fate = "kept" if whole else "left out (OUT holds quantised matrices alone)"
    click.echo(f"{fate}: {len(dense)} dense tensors, {size:,} bytes", err=True)
    for name, reason in refused.items():
        click.echo(f"refused {name}: {reason}", err=True)
