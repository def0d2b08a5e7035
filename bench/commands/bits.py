"""`vqbench bits`: what a format really costs, a weight and in bytes."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any

import click

from bench.tables import OUTPUTS, render
from bench.workload import Layer, load_workload, parse_shape
from vqkernels.errors import SpecError, UnsupportedError
from vqkernels.parts import BitCount, check_fit, check_shape, code_grid, effective_bits
from vqkernels.presets import PRESETS, parse_format
from vqkernels.spec import CodebookSpec

__all__ = ["command"]

_COLUMNS = {
    "format": "format",
    "layer": "layer",
    "shape": "n x k",
    "count": "count",
    "vectors": "vectors",
    "index_bytes": "index B",
    "codebook_bytes": "codebook B",
    "side_bytes": "side B",
    "index_bits": "index",
    "codebook_bits": "codebook",
    "side_bits": "side",
    "effective_bits": "bits/weight",
    "effective_bits_without_side": "without side",
    "fp16_bytes": "fp16 B",
    "ratio": "x smaller",
    "fits": "fits",
}

# Figures a weight: a table shows them to 1/10,000 bit, the machine forms as they are.
_PER_WEIGHT = (
    "index_bits",
    "codebook_bits",
    "side_bits",
    "effective_bits",
    "effective_bits_without_side",
    "ratio",
)
_BYTES = ("index_bytes", "codebook_bytes", "side_bytes", "bytes", "fp16_bytes")


def _shapes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Layer]:  # noqa: ARG001  # click's signature
    """`NxK` (output x input features) as layers of that name."""
    return [parse_shape(value) for value in values]


@dataclasses.dataclass(frozen=True)
class _Total:
    """Layers to add up: each counts `blocks` times."""

    layers: Sequence[Layer]
    blocks: int
    name: str


@click.command("bits")
@click.option("-f", "--format", "formats", multiple=True, help="Format; every preset unasked.")
@click.option("-w", "--workload", help="Layers of a model's block: a name, or a .toml file.")
@click.option("-l", "--layer", "patterns", multiple=True, help="Layers by glob, e.g. 'q_*'.")
@click.option("--model", is_flag=True, help="All blocks of the workload instead of one.")
@click.option("-s", "--shape", "shapes", multiple=True, callback=_shapes, help="A layer, as NxK.")
@click.option("--totals", is_flag=True, help="Only the total of each format.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    formats: tuple[str, ...],
    workload: str | None,
    patterns: tuple[str, ...],
    model: bool,
    shapes: list[Layer],
    totals: bool,
    output: str,
) -> None:
    """Effective bits: index, codebooks and side data (scales, outliers, rotation), all counted.

    A row a layer and a total for each format: bytes of each part, bits a weight with and without
    the side data, and how much smaller than fp16. A layer's bias is part of neither side.
    """
    if bool(workload) == bool(shapes):
        raise click.UsageError("give the layers: either --workload NAME or --shape NxK")
    if shapes and (model or patterns):
        raise click.UsageError("--model and --layer go with --workload")
    chosen = _workload(workload, patterns, model=model) if workload else _Total(shapes, 1, "total")
    rows = [
        row
        for name in formats or PRESETS
        for row in _rows(name, parse_format(name), chosen)
        if not totals or row["total"]
    ]
    if output not in ("table", "md"):
        click.echo(render(rows, None, output).rstrip("\n"))
        return
    click.echo(render([_shown(row) for row in rows], _COLUMNS, output).strip("\n"))
    for note in dict.fromkeys(f"{row['format']}: {row['note']}" for row in rows if row["note"]):
        click.echo(f"! {note}")


def _workload(name: str, patterns: Sequence[str], *, model: bool) -> _Total:
    found = load_workload(name)
    layers = [
        layer
        for layer in found.layers
        if not patterns or any(fnmatch.fnmatchcase(layer.name, glob) for glob in patterns)
    ]
    if not layers:
        names = ", ".join(layer.name for layer in found.layers)
        raise SpecError(
            f"workload {name}: no layer matches {' '.join(patterns)}; there are: {names}"
        )
    if model:
        return _Total(layers, found.blocks, f"total of {found.blocks} blocks")
    return _Total(layers, 1, "total" if patterns else "block")


def _rows(name: str, spec: CodebookSpec, chosen: _Total) -> Iterator[dict[str, Any]]:
    """A row a layer, then the total, which has no figures where a layer has none."""
    total, whole, refused = BitCount(), True, 0
    for layer in chosen.layers:
        bits, vectors, reason = _count(spec, layer)
        refused += bool(reason)
        yield {
            **_row(name, layer.name, bits, chosen.blocks),
            "n": layer.n,
            "k": layer.k,
            "vectors": vectors,
            "fits": not reason,
            "note": reason,
            "total": False,
        }
        if bits is None:
            whole = False
        else:
            # added block by block would be the same: the counts are whole numbers
            total += BitCount(*(chosen.blocks * part for part in dataclasses.astuple(bits)))
    count = len(chosen.layers) * chosen.blocks
    yield {
        **_row(name, chosen.name, total if whole else None, count),
        "fits": not refused,
        "note": "" if whole else "no total: a layer can't be cut as the format says",
        "total": True,
    }


def _count(spec: CodebookSpec, layer: Layer) -> tuple[BitCount | None, int | None, str]:
    """Bits and vectors of a layer, None where it can't be cut; and why it doesn't hold the format.

    A codebook larger than what it encodes is sensible for nothing, but its bits can be counted.
    """
    try:
        check_shape(spec, layer.n, layer.k)
    except UnsupportedError as error:
        return None, None, f"{layer.n}x{layer.k} can't be cut: {error}"
    vectors = math.prod(code_grid(spec, layer.n, layer.k))
    bits = effective_bits([(spec, layer.n, layer.k)])
    try:
        check_fit(spec, layer.n, layer.k)
    except UnsupportedError as error:
        return bits, vectors, str(error)
    return bits, vectors, ""


def _row(name: str, layer: str, bits: BitCount | None, count: int) -> dict[str, Any]:
    row: dict[str, Any] = {"format": name, "layer": layer, "n": None, "k": None, "count": count}
    row |= dict.fromkeys(("vectors", "weights", "total_bits", *_BYTES, *_PER_WEIGHT))
    if bits is None:
        return row
    parts = {"index": bits.index, "codebook": bits.codebook, "side": bits.side}
    total = sum(parts.values())
    figures = {
        **{f"{part}_bits": value / bits.weights for part, value in parts.items()},
        "effective_bits": bits.per_weight(),
        "effective_bits_without_side": bits.per_weight(side=False),
        "ratio": 16 / bits.per_weight(),
    }
    return {
        **row,
        "weights": bits.weights,
        "total_bits": total,
        **{f"{part}_bytes": math.ceil(value / 8) for part, value in parts.items()},
        "bytes": math.ceil(total / 8),
        "fp16_bytes": 2 * bits.weights,
        # 16 digits, as such figures are published; total_bits and weights are exact
        **{key: float(f"{value:.16g}") for key, value in figures.items()},
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    figures = {
        key: f"{row[key]:.2f}" if key == "ratio" else f"{row[key]:.4f}"
        for key in _PER_WEIGHT
        if row[key] is not None
    }
    return {**row, **figures, "shape": None if row["n"] is None else f"{row['n']}x{row['k']}"}
