"""`vqbench export`: what tuning found, as tables that `vq_linear` reads, or as rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from autotune import export
from autotune.store import Store
from bench.tables import render
from vqkernels import tuned_lookup
from vqkernels.errors import ContainerError
from vqkernels.tuned_table import Table

__all__ = ["command"]


def _csv(store: Store) -> str:
    return render([export.flat_row(row) for row in export.attempt_rows(store)], None, "csv")


def _json(store: Store) -> str:
    return json.dumps(list(export.attempt_rows(store)), indent=1)


# What the attempts of a store can be written as: one text a store.
_TEXTS: dict[str, Callable[[Store], str]] = {"csv": _csv, "json": _json}
_FORMATS = ("table", *_TEXTS, *export.FORMATS)


@click.command("export")
@click.option("--to", help="user, package, or a path. A table: user; rows: standard output.")
@click.option(
    "--format", "form", type=click.Choice(["table", *_TEXTS, *export.FORMATS]), default="table"
)
@click.option("--store", "url", help="Database URL; VQBENCH_STORE, or the user's SQLite file.")
def command(to: str | None, form: str, url: str | None) -> None:
    """Write tuned tables, or every attempt of the store as rows.

    A table holds one device's choices: a config only where it beat the kernel's default, else
    that the default stays. Entries of a table that is there are kept unless there are newer ones.

    vq_linear and `vqbench explain` look for tables in this order: what vqkernels.use_tables was
    given; VQBENCH_TUNED, a file or a folder; the user's configuration folder (`--to user`); the
    package itself (`--to package`). Anything that doesn't fit the device, the kernels' sources or
    the compilers any more is passed over with a warning, and the default serves.

    `kernel-tuner` and `t4` write a file for each product and kernel into the folder `--to` (named
    after the format unasked): what those tools read, and what vqbench replays.
    """
    store = Store(url)
    try:
        if form == "table":
            _write_tables(store, to or "user")
        elif form in export.FORMATS:
            _write_spaces(store, to or form, form)
        else:
            _write_text(_TEXTS[form](store), to)
    finally:
        store.close()


def _write_tables(store: Store, to: str) -> None:
    tables = export.collect(store)
    if not tables:
        raise ContainerError(f"store {store.url}: no verdicts yet; run `vqbench tune` first")
    if to == "package":
        tables = [export.without_origin(table) for table in tables]
    for table, path in zip(tables, _paths(tables, to), strict=True):
        whole = export.write_table(table, path)
        kept = sum(entry.keeps_default for entry in whole.entries)
        click.echo(
            f"{path}: {whole.device}: {len(whole.entries) - kept} configs faster than the "
            f"default, {kept} problems where it stays"
        )


def _write_spaces(store: Store, to: str, form: str) -> None:
    paths = export.write_spaces(store, Path(to), form)
    if not paths:
        raise ContainerError(f"store {store.url}: no attempts yet; run `vqbench tune` first")
    for path in paths:
        click.echo(path)


def _paths(tables: list[Table], to: str) -> list[Path]:
    """The file of each table: a folder holds one for each device."""
    if to.endswith(".json"):
        if len(tables) > 1:
            raise ContainerError(f"{to}: there are {len(tables)} devices; name a folder")
        return [Path(to)]
    if to == "user":
        folder = tuned_lookup.user_folder()
    else:
        folder = tuned_lookup.PACKAGE if to == "package" else Path(to)
    return [folder / export.file_name(table.device) for table in tables]


def _write_text(text: str, to: str | None) -> None:
    if to is None:
        click.echo(text)
        return
    if to in ("user", "package"):
        raise click.UsageError(f"--to {to} is for tables: name a file, or leave it out")
    try:
        Path(to).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ContainerError(f"{to}: {error.strerror}; choose another file") from error
