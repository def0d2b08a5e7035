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
# Of formats whose entries are int8.
_INT8 = {"int8": "int8 cost %"}


def report(layers: Sequence[Layer], choice: Choice, refused: Mapping[str, str]) -> None:
    """The table on standard output; what was refused or skipped beside it."""
    found = {layer.info.name: layer for layer in layers}
    rows = [_row(name, found.get(name), choice) for name in choice.formats]
    if len(layers) > 1:
        rows.append(_total(layers))
    columns = _COLUMNS | (_INT8 if any("int8" in row for row in rows) else {})
    click.echo(render(rows, columns, "table").strip("\n"))
    for name, reason in refused.items():
        click.echo(f"refused {name}: {reason}", err=True)
    for reason, names in choice.skipped.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        click.echo(f"skipped {len(names)} {reason}: {', '.join(names[:3])}{more}", err=True)


def _row(name: str, layer: Layer | None, choice: Choice) -> Row:
    n, k = choice.shapes[name]
    row: Row = {"layer": name, "shape": f"{n}x{k}", "status": "refused"}
    if layer is not None:
        of_int8 = layer.info.spec.codebook_dtype == "int8"
        row |= {"status": "ok", **_numbers(layer.info.bits, layer.spent, of_int8)}
    return row


def _total(layers: Sequence[Layer]) -> Row:
    bits, spent = BitCount(), Spent(0.0, 0.0, 0.0)
    for layer in layers:
        bits, spent = bits + layer.info.bits, spent + layer.spent
    of_int8 = any(layer.info.spec.codebook_dtype == "int8" for layer in layers)
    return {"layer": "all", "status": "ok", **_numbers(bits, spent, of_int8)}


def _numbers(bits: BitCount, spent: Spent, of_int8: bool) -> Row:
    return {
        **({"int8": f"{100 * spent.int8_cost:+.2f}"} if of_int8 else {}),
        "bits": f"{bits.per_weight():.4f}",
        "error": f"{spent.error:.4f}",
        "seconds": spent.seconds,
    }
