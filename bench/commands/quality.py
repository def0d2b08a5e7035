"""`vqbench quality`: how much of a model quantised matrices have lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from bench.conversion import progress
from bench.environment import describe_host
from bench.quality import limits as gate
from bench.quality.candidates import Candidate, Job, digests, quantised_here, stored
from bench.quality.judge import judge
from bench.quality.layers import Calibrated
from bench.quality.original import Original, linear_weights, original_of
from bench.quality.report import Report, read_report, write_report
from bench.quality.tables import layer_rows, notes, text
from bench.tables import OUTPUTS, render
from vqkernels.device import detect_cpu
from vqkernels.presets import parse_format
from vqkernels.quantize import Recipe

__all__ = ["command"]


@click.command("quality")
@click.argument("model")
@click.argument("quantised", nargs=-1, type=click.Path(path_type=Path))
@click.option("-f", "--format", "formats", multiple=True, help="Quantise MODEL so, and judge that.")
@click.option("-l", "--layer", "patterns", multiple=True, help="Tensors by glob, e.g. '*.query.*'.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of all chance.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write all of it there.")
@click.option("--limit", "limits", multiple=True, help="E.g. relative_error=0.1; exit code 1 past.")
@click.option("--totals", is_flag=True, help="No table of the layers.")
@click.option("--worst", default=3, show_default=True, type=click.IntRange(0), help="So many.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    model: str,
    quantised: tuple[Path, ...],
    formats: tuple[str, ...],
    patterns: tuple[str, ...],
    seed: int,
    target: Path | None,
    limits: tuple[str, ...],
    totals: bool,
    worst: int,
    output: str,
) -> None:
    """What QUANTISED lost of MODEL: in its weights, in its layers' outputs, in its codes.

    MODEL is dense: a .safetensors file, a model's folder, or `minilm`. QUANTISED is whatever
    `vqbench convert` reads; several, and several --format, are compared in one table. A tensor
    `x.weight` and a module `x` are the same. Or MODEL is a report that --json wrote, which is shown
    again and held to --limit.

    A row a layer: MSE, relative error `sum (W-W^)^2 / sum W^2`, cosine and largest error of the
    weights; error and cosine of the outputs `x W^T`; entropy of each stage's codes against that of
    even use, and entries that no code names. docs/quality.md tells how to read it.

    --limit NAME=VALUE, of every layer; `total.NAME` of all of them together. Exit code 1 if one is
    not kept.
    """
    asked = [gate.parse_limit(one) for one in limits]
    if model.endswith(".json"):
        if quantised or formats or patterns or target:
            raise click.UsageError(f"{model} is a report already: give --limit and --output alone")
        report = read_report(Path(model))
    else:
        report = _report(original_of(model), quantised, formats, patterns, seed)
    if target is not None:
        write_report(target, report)
    if output in ("table", "md"):
        click.echo(text(report, output, worst=worst, totals=totals))
    else:
        click.echo(render(layer_rows(report), None, output).rstrip("\n"))
    for line in notes(report):
        click.echo(line, err=True)
    lines = gate.beyond(report, asked)
    for line in lines:
        click.echo(f"beyond its limit: {line}", err=True)
    sys.exit(1 if lines else 0)


def _report(
    original: Original,
    quantised: Sequence[Path],
    formats: Sequence[str],
    patterns: Sequence[str],
    seed: int,
) -> Report:
    if not quantised and not formats:
        raise click.UsageError("give what is quantised: QUANTISED, or --format to do it here")

    moments_of = dict[str, Calibrated]().get

    candidates = [stored(path, label, patterns) for path, label in _labels(quantised).items()]
    candidates += _here(original, formats, patterns, seed, moments_of)
    with progress(sum(len(one.tensors) for one in candidates)) as begin:
        step = begin("measuring")
        found = tuple(
            judge(one, original, moments_of, seed=seed, on_layer=step) for one in candidates
        )
    sha256 = {file.name: digest for file in original.files for digest in digests(file).values()}
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("vqbench", *sys.argv[1:]),
        seed=seed,
        environment=describe_host(detect_cpu()),
        model={"name": original.path.resolve().name, "sha256": sha256},
        calibration=None,
        candidates=found,
    )


def _here(
    original: Original,
    formats: Sequence[str],
    patterns: Sequence[str],
    seed: int,
    moments_of: Callable[[str], Calibrated | None],
) -> list[Candidate]:
    names = linear_weights(original, patterns) if formats else []
    found = []
    for name in dict.fromkeys(formats):
        job = Job(parse_format(name), Recipe(), seed, weighted=False)
        label = Path(name).stem if name.endswith(".toml") else name
        found.append(quantised_here(label, job, original, names, moments_of))
    return found


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each path, or all of it where several have that name."""
    names = [path.resolve().name for path in paths]
    return {
        path: str(path) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    }
