"""What is told of a quantised model: a row a layer, one for all, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from bench.quantizing.choice import Choice
from bench.quantizing.work import Layer, Spent
from bench.tables import render
from vqkernels.parts import BitCount

__all__ = ["report"]

Row = dict[str, Any]

_COLUMNS = {
    "layer": "layer",
    "shape": "n x k",
    "status": "status",
    "bits": "bits/weight",
    "error": "relative error",
    "seconds": "seconds",
}


def report(layers: Sequence[Layer], choice: Choice, refused: Mapping[str, str]) -> None:
    """The table on standard output; what was refused or skipped beside it."""
    found = {layer.info.name: layer for layer in layers}
    rows = [_row(name, found.get(name), choice) for name in choice.formats]
    if len(layers) > 1:
        rows.append(_total(layers))
    click.echo(render(rows, _COLUMNS, "table").strip("\n"))
    for name, reason in refused.items():
        click.echo(f"refused {name}: {reason}", err=True)
    for reason, names in choice.skipped.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        click.echo(f"skipped {len(names)} {reason}: {', '.join(names[:3])}{more}", err=True)


def _row(name: str, layer: Layer | None, choice: Choice) -> Row:
    n, k = choice.shapes[name]
    row: Row = {"layer": name, "shape": f"{n}x{k}", "status": "refused"}
    if layer is not None:
        row |= {"status": "ok", **_numbers(layer.info.bits, layer.spent)}
    return row


def _total(layers: Sequence[Layer]) -> Row:
    bits, spent = BitCount(), Spent(0.0, 0.0, 0.0)
    for layer in layers:
        bits, spent = bits + layer.info.bits, spent + layer.spent
    return {"layer": "all", "status": "ok", **_numbers(bits, spent)}


def _numbers(bits: BitCount, spent: Spent) -> Row:
    return {
        "bits": f"{bits.per_weight():.4f}",
        "error": f"{spent.error:.4f}",
        "seconds": spent.seconds,
    }
