"""`vqbench calibrate`: what a model's linear layers are given, for a quantizer to go by."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from bench.calibrating import (
    Batch,
    Texts,
    batches,
    load,
    model_folder,
    read_texts,
    run,
)
from bench.conversion import progress
from bench.tables import OUTPUTS, render
from vqkernels.calibration import (
    Calibration,
    CalibrationWarning,
    collect,
    load_calibration,
    save_calibration,
)
from vqkernels.container.origin import library_stamp
from vqkernels.errors import ContainerError, TensorError

__all__ = ["command"]

_COLUMNS = {
    "layer": "layer",
    "inputs": "inputs",
    "tokens": "tokens",
    "held_out": "held out",
    "rms": "rms",
    "largest": "largest / mean square",
}


@click.command("calibrate")
@click.argument("model")
@click.option("-o", "--output", "target", required=True, type=click.Path(path_type=Path))
@click.option("--texts", type=click.Path(path_type=Path), help="A sample a line, UTF-8.")
@click.option("--full/--diagonal", default=True, show_default=True, help="X^T X, or x^2 alone.")
@click.option("-l", "--layer", "patterns", multiple=True, help="Modules by glob, e.g. '*.query'.")
@click.option("--tokens", type=click.IntRange(1), help="Stop after about so many.")
@click.option(
    "--holdout",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 0.5, max_open=True),
    help="Share of the lines that layers' outputs are tested with.",
)
@click.option("--device", default="cpu", show_default=True, help="What the model runs on.")
@click.option("--form", type=click.Choice(OUTPUTS), default="table", help="Of what is printed.")
def command(
    model: str,
    target: Path,
    texts: Path | None,
    full: bool,
    patterns: tuple[str, ...],
    tokens: int | None,
    holdout: float,
    device: str,
    form: str,
) -> None:
    """Run MODEL over text, and write what its linear layers are given to FILE.

    MODEL is a Hugging Face model's folder (an encoder or a causal language model, in safetensors),
    or `minilm`. Without --texts: over lines that are built in. FILE is what `vqbench quantize` and
    `vqbench quality` take as --calibration. X^T X of a layer of k inputs takes 4 k^2 bytes there,
    and twice as much while the model runs: with --diagonal, 4 k.
    """
    lines = read_texts(texts)
    folder = model_folder(model)
    _check_target(target)
    network, tokenizer = load(folder, device)
    every = _counted(batches(network, tokenizer, lines), tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        with progress(len(every)) as begin:
            try:
                found = collect(
                    network,
                    _shown(every, begin("calibrating")),
                    layers=patterns or None,
                    full=full,
                    holdout=holdout,
                    forward=run,
                )
            except TensorError as error:
                raise TensorError(f"{folder}: {error}") from error
    provenance = _provenance(folder, lines, found)
    save_calibration(target, Calibration(dict(found), provenance))
    click.echo(render([_row(name, found) for name in found], _COLUMNS, form).rstrip("\n"))
    for one in caught:
        click.echo(f"warning: {one.message}", err=True)
    click.echo(f"wrote {target}", err=True)


def _check_target(target: Path) -> None:
    """Raise ContainerError where FILE can't be written, before a model has run for hours."""
    if not target.parent.is_dir():
        raise ContainerError(f"{target.parent}: there is no such folder; make it first")
    if target.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise ContainerError(f"{target}: can't be written; choose another name or folder")
    if target.exists():
        try:
            load_calibration(target)
        except ContainerError as error:
            raise ContainerError(
                f"{target}: is there already and no calibration; choose another name"
            ) from error


def _counted(every: Iterable[Batch], tokens: int | None) -> list[Batch]:
    """The batches that hold the first `tokens` tokens; all for None."""
    found, left = [], math.inf if tokens is None else tokens
    for batch in every:
        if left <= 0:
            break
        left -= int(batch["attention_mask"].sum())
        found.append(batch)
    return found


def _shown(every: Sequence[Batch], step: Callable[[str], None]) -> Iterator[Batch]:
    """Each batch; `step` is called when the next one is asked for."""
    for batch in every:
        yield batch
        step("")


def _provenance(folder: Path, lines: Texts, found: Calibration) -> dict[str, str]:
    return {
        "model": folder.resolve().name,
        "texts": lines.name,
        "texts_sha256": lines.sha256,
        "tokens": str(max(moments.count for moments in found.values())),
        "libraries": library_stamp(),
    }


def _row(name: str, found: Calibration) -> dict[str, Any]:
    moments = found[name]
    mean = float(moments.diagonal.double().mean())
    return {
        "layer": name,
        "inputs": moments.diagonal.numel(),
        "tokens": moments.count,
        "held_out": 0 if moments.inputs is None else len(moments.inputs),
        "rms": math.sqrt(mean),
        "largest": float(moments.diagonal.max()) / mean if mean else None,
    }
