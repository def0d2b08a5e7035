"""`vqbench quality`: how much of a model quantised matrices have lost."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.quality.canaries import OWN as OWN_CANARIES
from bench.quality.limits import beyond, failed_canaries, parse_limit
from bench.quality.original import MINILM
from bench.quality.report import read_report, write_report
from bench.quality.run import Asked, make_report
from bench.quality.sentences import OWN as OWN_SENTENCES
from bench.quality.tables import layer_rows, notes, text
from bench.quality.whole import EndToEnd
from bench.quantizing.recipes import recipe_of
from bench.tables import OUTPUTS, render

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("quality")
@click.argument("model")
@click.argument("quantised", nargs=-1, type=_PATH)
@click.option("-f", "--format", "formats", multiple=True, help="Quantise MODEL so, and judge that.")
@click.option("-l", "--layer", "patterns", multiple=True, help="Tensors by glob, e.g. '*.query.*'.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of all chance.")
@click.option("--calibration", type=_PATH, help="Inputs of layers, by `vqbench calibrate`.")
@click.option("--weighted", is_flag=True, help="Quantise --format for the calibration's inputs.")
@click.option("--recipe", "recipe_file", type=_PATH, help="Of --format: a .toml file.")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="A field of Recipe.")
@click.option(
    "--end-to-end/--no-end-to-end",
    "encoder",
    default=None,
    help="Run MODEL as a sentence encoder, dense and quantised; of minilm, unasked too.",
)
@click.option("--perplexity", "text_file", type=_PATH, help="... as a language model, on a text.")
@click.option("--evaluator", "evaluators", multiple=True, help="... as this function or command.")
@click.option("--direction", "directions", multiple=True, help="+NAME: more of it is better; or -.")
@click.option("--sentences", type=_PATH, help="A TOML file of one's own, for --end-to-end.")
@click.option("--canaries", type=_PATH, help="A TOML file of one's own; exit code 1 if one fails.")
@click.option("--json", "target", type=_PATH, help="Write all of it there.")
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
    calibration: Path | None,
    weighted: bool,
    recipe_file: Path | None,
    settings: tuple[str, ...],
    encoder: bool | None,
    text_file: Path | None,
    evaluators: tuple[str, ...],
    directions: tuple[str, ...],
    sentences: Path | None,
    canaries: Path | None,
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

    With --calibration the outputs are those on inputs that it held out, and errors are weighted by
    its inputs too; without one, outputs are those on made-up Gaussian inputs, and marked so.

    A row a layer: MSE, relative error `sum (W-W^)^2 / sum W^2`, cosine and largest error of the
    weights; error and cosine of the outputs `x W^T`; entropy of each stage's codes against that of
    even use, and entries that no code names. docs/quality.md tells how to read it.

    --evaluator is package.module:function, of `model`, `tokenizer` or `folder`, or a command with
    {model} where the folder goes, whose last line is a JSON object of figures.

    --limit NAME=VALUE, of every layer; `total.NAME` of all of them together. Exit code 1 if one is
    not kept, or a canary fails.
    """
    asked = [parse_limit(one) for one in limits]
    if model.endswith(".json"):
        if quantised or formats or patterns or target or calibration:
            raise click.UsageError(f"{model} is a report already: give --limit and --output alone")
        report = read_report(Path(model))
    else:
        if not quantised and not formats:
            raise click.UsageError("give what is quantised: QUANTISED, or --format to do it here")
        if len(evaluators) != 1 and directions:
            raise click.UsageError("--direction is of one --evaluator: run it by itself")
        if weighted and not (formats and calibration):
            raise click.UsageError("--weighted is of --format, by a --calibration: add both")
        report = make_report(
            Asked(
                model=model,
                patterns=patterns,
                quantised=quantised,
                formats=formats,
                recipe=recipe_of(recipe_file, settings, None),
                calibration=calibration,
                weighted=weighted,
                seed=seed,
                end_to_end=EndToEnd(
                    encoder=model == MINILM if encoder is None else encoder,
                    text=text_file,
                    evaluators=evaluators,
                    directions=directions,
                    sentences=sentences or OWN_SENTENCES,
                    canaries=canaries or OWN_CANARIES,
                ),
            )
        )
    if target is not None:
        write_report(target, report)
    if output in ("table", "md"):
        click.echo(text(report, output, worst=worst, totals=totals))
    else:
        click.echo(render(layer_rows(report), None, output).rstrip("\n"))
    for line in notes(report):
        click.echo(line, err=True)
    lines = [f"failed: {line}" for line in failed_canaries(report)]
    lines += [f"beyond its limit: {line}" for line in beyond(report, asked)]
    for line in lines:
        click.echo(line, err=True)
    sys.exit(1 if lines else 0)
