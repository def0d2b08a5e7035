"""`vqbench inspect`: what a container holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.format_text import changed_fields, told
from bench.tables import render
from vqkernels import container
from vqkernels.container import Container, ContainerInfo, TensorInfo
from vqkernels.container.stored import code_bytes, packed_bytes
from vqkernels.parallel import MAPPING, ParallelSource, open_parallel
from vqkernels.quality import usage
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["command"]

Row = dict[str, Any]

_COLUMNS = {
    "tensor": "tensor",
    "shape": "n x k",
    "format": "format",
    "bias": "bias",
    "index": "index",
    "codebook": "codebook",
    "side": "side",
    "effective": "bits/weight",
    "stored_bytes": "stored B",
    "codes": "codes",
    "made": "made",
    "decoded": "sha256 decoded",
}
_VERIFIED = {"entries": "used entries", "entropy": "code entropy, bits"}

_CUT_COLUMNS = {
    "tensor": "tensor",
    "shape": "n x k",
    "format": "format",
    "bias": "bias",
    "axis": "cut by",
    "cuts": "at",
    "stored_bytes": "stored B, all ranks",
}

_SHORT = 12  # hexadecimal digits that a table shows of a checksum, as git does
_LONG = 80  # characters that a table shows of how a matrix was made


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read all of it and check every checksum.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def command(file: Path, verify: bool, output: str) -> None:
    """Describe the container FILE: origin, formats, effective bits, sizes and checksums.

    FILE is a file, a folder of shards, or a folder of ranks, of which is said how each matrix was
    cut. Unless asked to verify, only headers are read. Verifying compares the SHA-256 of each
    stored part and of the dequantised weight, and the stored usage with the codes, checks that
    codes are in range, and shows how many entries of each codebook are used and the entropy of
    its codes.
    """
    if (file / MAPPING).is_file() or file.name == MAPPING:
        _describe_ranks(open_parallel(file), file, verify, output)
        return
    source = container.open_container(file)
    info = source.info
    rows = [_row(tensor) for tensor in info.tensors]
    if verify:
        for row in rows:
            # one at a time: a model's codes, unpacked, need not fit in memory together
            row |= {"verified": True, "stages": _usage(source.verify(row["tensor"]))}
    if output == "json":
        click.echo(json.dumps({"file": str(file), **_head(info), "tensors": rows}, indent=2))
        return
    click.echo(f"{file}: {_size(source):,} bytes, {len(rows)} tensors")
    for key, value in (*_versions(info).items(), *info.provenance.items()):
        click.echo(f"  {_printable(key)}: {_printable(str(value))}")
    columns = _COLUMNS | (_VERIFIED if verify else {})
    click.echo(render([_shown(row) for row in rows], columns, "table").strip("\n"))
    if verify:
        click.echo(f"every checksum of {len(rows)} tensors matches, stored and dequantised")
    if any("ans" in row["coding"] for row in rows):
        coded, packed = (sum(row[key] for row in rows) for key in ("code_bytes", "packed_bytes"))
        click.echo(f"entropy coding: {coded:,} bytes of codes instead of {packed:,}")


def _size(source: Container) -> int:
    """Bytes of the file, or of a set's shards and index."""
    shards = [source.path.parent / name for name in source.info.extra.get("shards", ())]
    return sum(path.stat().st_size for path in (source.path, *shards))


def _describe_ranks(source: ParallelSource, file: Path, verify: bool, output: str) -> None:
    """How each matrix is cut; with `verify`, each is merged and its checksums compared."""
    rows = [_cut_row(source, name) for name in source]
    if verify:
        for row in rows:
            source.verify(row["tensor"])
            row["verified"] = True
    if output == "json":
        head = {"file": str(file), "ranks": len(source.ranks), "tensors": rows}
        click.echo(json.dumps(head, indent=2))
        return
    size = source.path.stat().st_size + sum(_size(rank) for rank in source.ranks)
    click.echo(f"{file}: {size:,} bytes, {len(rows)} tensors, {len(source.ranks)} ranks")
    shown = [
        {
            **row,
            "shape": f"{row['n']}x{row['k']}",
            "format": told(row["format"]),
            "cuts": ",".join(str(cut) for cut in row["cuts"]),
            "stored_bytes": sum(row["stored_bytes"]),
        }
        for row in rows
    ]
    click.echo(render(shown, _CUT_COLUMNS, "table").strip("\n"))
    if verify:
        click.echo(f"every checksum of {len(rows)} tensors matches, in each rank and merged")


def _cut_row(source: ParallelSource, name: str) -> Row:
    whole, cut = source.outline(name), source.cut(name)
    return {
        "tensor": name,
        "n": whole.n,
        "k": whole.k,
        "bias": whole.bias,
        "format": changed_fields(whole.spec),
        "axis": cut.axis,
        "cuts": list(cut.cuts),
        "stored_bytes": [rank.outline(name).stored_bytes for rank in source.ranks],
    }


def _versions(info: ContainerInfo) -> dict[str, int]:
    return {"container_version": info.version, "spec_version": info.spec_version}


def _head(info: ContainerInfo) -> dict[str, Any]:
    return {**_versions(info), "provenance": dict(info.provenance)}


def _row(tensor: TensorInfo) -> Row:
    bits = tensor.bits
    return {
        "tensor": tensor.name,
        "n": tensor.n,
        "k": tensor.k,
        "bias": tensor.bias,
        "format": changed_fields(tensor.spec),
        "index_bits": bits.index / bits.weights,
        "codebook_bits": bits.codebook / bits.weights,
        "side_bits": bits.side / bits.weights,
        "effective_bits": bits.per_weight(),
        "effective_bits_without_side": bits.per_weight(side=False),
        "stored_bytes": tensor.stored_bytes,
        "coding": list(tensor.coding),
        "code_bytes": code_bytes(tensor),
        "packed_bytes": packed_bytes(tensor, _stages(tensor.spec)),
        "usage": tensor.usage,
        "made": dict(tensor.made),
        "sha256": dict(tensor.checksums),
        "decoded_sha256": tensor.decoded_checksum,
    }


def _stages(spec: CodebookSpec) -> range:
    return range(len(spec.stages))


def _usage(tensor: QuantizedTensor) -> list[Row]:
    """Entries of each stage that some vector uses, over all its codebooks, and its entropy."""
    names = ("used_entries", "entries", "entropy_bits", "code_bits")
    return [
        dict(zip(names, (one.used, one.entries, one.entropy_bits, one.code_bits), strict=True))
        for one in usage(tensor)
        if one.stage != "outliers"
    ]


def _shown(row: Row) -> Row:
    stages = row.get("stages", [])
    return {
        **row,
        "shape": f"{row['n']}x{row['k']}",
        "format": told(row["format"]),
        **{name: f"{row[f'{name}_bits']:.4f}" for name in ("index", "codebook", "side")},
        "effective": f"{row['effective_bits']:.4f}",
        "codes": _coded(row),
        "made": _shortened(told(row["made"])),
        "decoded": row["decoded_sha256"][:_SHORT],
        "entries": " + ".join(f"{stage['used_entries']}/{stage['entries']}" for stage in stages),
        "entropy": " + ".join(
            f"{stage['entropy_bits']:.2f}/{stage['code_bits']}" for stage in stages
        ),
    }


def _coded(row: Row) -> str:
    """How the codes are stored, and what that saves."""
    coding = list(dict.fromkeys(row["coding"]))
    if coding == ["packed"]:
        return "packed"
    return f"{'+'.join(coding)} -{1 - row['code_bytes'] / row['packed_bytes']:.2%}"


def _shortened(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _printable(text: str) -> str:
    """`text` with line ends and escape sequences spelled out: a file may come from anywhere."""
    return text if text.isprintable() else ascii(text)
