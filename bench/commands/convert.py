"""`vqbench convert`: quantised matrices from one layout to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import click

from bench.conversion import Kind, Layout, check_target, progress, size_bytes, store
from bench.options import parse_size
from bench.sources import Traversal, View, chosen, is_whole_model, provenance_of, stored_bytes
from bench.tables import render
from vqkernels.container.manifest import Coding, located
from vqkernels.formats import open_source
from vqkernels.formats.write_checkpoint import SHARD_BYTES
from vqkernels.parallel import SplitAxis, axis_of
from vqkernels.source import TensorSource

__all__ = ["command"]

_COLUMNS = {
    "tensor": "tensor",
    "shape": "n x k",
    "before": "bytes before",
    "after": "bytes after",
    "change": "change %",
}


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option("-o", "--output", "target", required=True, type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["container", "npz", "plain", "vptq", "aqlm"]),
    help="What OUT is to be; unasked: a container, or *.npz by its name.",
)
@click.option(
    "--shard-size", metavar="SIZE", callback=parse_size, help="Of a shard (5GB): 2GB, 500MiB."
)
@click.option("--tensor-parallel", "ranks", type=click.IntRange(1), help="A folder for N ranks.")
@click.option("--row", "rows", multiple=True, help="Tensors, by glob, to cut by output features.")
@click.option("--column", "columns", multiple=True, help="... and those to cut by input features.")
@click.option("--codes", type=click.Choice(["packed", "ans"]), help="ans: entropy-coded.")
@click.option("--traversal", type=click.Choice(["row", "column"]), help="Order of stored codes.")
@click.option("-t", "--tensor", "patterns", multiple=True, help="Tensors by glob; all unasked.")
@click.option("--force", is_flag=True, help="Replace what is at OUT.")
@click.option("--verify/--no-verify", default=True, help="Read everything back and compare it.")
def command(
    source: Path,
    target: Path,
    to: str | None,
    shard_size: int | None,
    ranks: int | None,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    codes: Coding | None,
    traversal: Traversal | None,
    patterns: tuple[str, ...],
    force: bool,
    verify: bool,
) -> None:
    """Write the quantised matrices of IN to OUT in another layout, bit for bit.

    IN is a container (a file, a folder of shards or of ranks), a VPTQ or AQLM checkpoint's
    folder, an .npz file or a folder of plain files. OUT is a container: one file if it is called
    *.safetensors, else a folder of shards, or of ranks with --tensor-parallel (of any other
    number in IN); or what --to says. A checkpoint becomes a checkpoint with all its other tensors.

    OUT is written whole or not at all, one matrix (or shard) in memory at a time, and gets its
    name once every matrix has been read back and found equal.
    """
    given = {
        "--tensor-parallel": ranks,
        "--codes": codes,
        "--traversal": traversal,
        "--shard-size": shard_size,
    }
    kind = _kind(target, to, {option for option, value in given.items() if value is not None})
    if (rows or columns) and not ranks:
        raise click.UsageError("--row and --column say how to cut: add --tensor-parallel")
    check_target(source, target, force=force)
    try:
        opened = open_source(source)
        with located(source):
            names = chosen(opened, patterns)
            axes = _axes(opened, rows, columns)
        layout = Layout(
            kind=kind,
            codes=codes or "packed",
            shard_bytes=shard_size or SHARD_BYTES,
            ranks=ranks or 1,
            axis_of=lambda name: axes.get(name) or axis_of(name),
        )
        before = {name: stored_bytes(opened, name) for name in names}
        with progress(len(names)) as begin:
            view = View(opened, names, traversal=traversal, on_read=begin("converting"))
            check = begin("comparing") if verify else None
            after = store(target, view, layout, provenance_of(opened), verify=check)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {target} was not written", err=True)
        sys.exit(130)
    _report(view, before, after)
    if layout.kind not in ("vptq", "aqlm") and is_whole_model(opened):
        click.echo("left out what isn't quantised (`vqbench import` keeps it)", err=True)
    if left := len(opened) - len(names):
        click.echo(f"left out {left} tensors that no --tensor matches", err=True)
    told = "every matrix reads back equal" if verify else "nothing was read back"
    click.echo(f"wrote {target} ({size_bytes(target):,} bytes): {told}", err=True)


# ------------------------------------------------------------------------------------------------
# options


def _kind(target: Path, to: str | None, given: set[str]) -> Kind:
    """What OUT is to be. Raises UsageError for options that don't go with it."""
    asked = to or ("npz" if target.suffix == ".npz" else "container")
    if asked != "container":
        given -= {"--shard-size"} if asked in ("vptq", "aqlm") else set()
        if given:
            raise click.UsageError(f"{min(given)} is of containers: leave it out for {asked}")
        kind = cast(Kind, asked)
    elif "--tensor-parallel" in given:
        if "--shard-size" in given:
            raise click.UsageError("--shard-size and --tensor-parallel: leave one of them out")
        kind = "parallel"
    else:
        one_file = target.suffix == ".safetensors" and "--shard-size" not in given
        kind = "container" if one_file else "shards"
    if (kind == "container", kind == "npz") != (
        target.suffix == ".safetensors",
        target.suffix == ".npz",
    ):
        raise click.UsageError(
            f"{target} is no name for that: one container is *.safetensors, arrays are *.npz, and "
            f"a folder is neither"
        )
    return kind


def _axes(
    source: TensorSource, rows: tuple[str, ...], columns: tuple[str, ...]
) -> dict[str, SplitAxis]:
    """How the matrices that --row and --column name are to be cut."""
    asked: dict[SplitAxis, tuple[str, ...]] = {"row": rows, "column": columns}
    axes: dict[str, SplitAxis] = {}
    for axis, patterns in asked.items():
        for name in chosen(source, patterns) if patterns else []:
            if axes.setdefault(name, axis) != axis:
                raise click.UsageError(f"{name!r} is named by --row and by --column; use one")
    return axes


# ------------------------------------------------------------------------------------------------
# what is printed


def _report(view: View, before: dict[str, int | None], after: dict[str, int | None]) -> None:
    rows: list[dict[str, Any]] = []
    for name, size in after.items():
        outline = view.outline(name)
        rows.append(
            {
                "tensor": name,
                "shape": f"{outline.n}x{outline.k}",
                "before": before[name],
                "after": size,
                "change": _change(before[name], size),
            }
        )
    known = [row for row in rows if row["change"] is not None]
    if len(known) == len(rows) > 1:
        old, new = (sum(row[key] for row in rows) for key in ("before", "after"))
        rows.append({"tensor": "all", "before": old, "after": new, "change": _change(old, new)})
    click.echo(render(rows, _COLUMNS, "table").strip("\n"))


def _change(before: int | None, after: int | None) -> str | None:
    return f"{100 * (after / before - 1):+.2f}" if before and after else None
