"""What `vqbench gate` and `vqbench selfcheck` ask alike, and how both show where they are."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from bench.gate.journal import read_options
from bench.gate.run import Options
from bench.gate.session import Progress
from bench.options import selecting, usual_dtype, where

__all__ = ["asked", "asking", "watched"]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--pairs", default=7, type=click.IntRange(3, 99), help="Pairs of processes."),
    click.option("--seed", default=0, help="Of activations, synthetic weights and the quantizer."),
    click.option("--time", "seconds", default=0.3, help="Seconds of samples, a case and process."),
    click.option("--samples", default=300, type=click.IntRange(7), help="At most so many samples."),
    click.option("--hot", is_flag=True, help="Measure with the weight in cache; marked so."),
    click.option("--results", default="results", type=click.Path(path_type=Path), help="Folder."),
    click.option("--resume", type=click.Path(path_type=Path), help="Go on with these records."),
    click.option(
        "--noise", type=click.Path(path_type=Path), help="A selfcheck's file, if not the user's."
    ),
)

# Unasked: one square layer of a 7B model in the formats whose kernels serve most models.
_DEFAULT = {
    "workloads": ("llama2-7b",),
    "layers": ("q_proj",),
    "formats": ("rq-2x256x8", "aqlm-2x8"),
}


def asking(command: F) -> F:
    """Options that select cases, say how they are measured, and where records go."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return selecting(command)


def asked(given: Mapping[str, Any]) -> Options:
    """What the command line asks for; with `--resume`, what those records were asked for."""
    if given["resume"] is not None:
        return Options.from_dict(read_options(given["resume"]))
    device = where(given["device"], given["threads"])
    narrowed = any(given[name] for name in _DEFAULT) or given["fuse"]
    names = {field.name for field in dataclasses.fields(Options)}
    chosen = {name: value for name, value in given.items() if name in names and value != ()}
    return Options(
        **{
            **({} if narrowed else _DEFAULT),
            **chosen,
            "device": device.torch_name,
            "threads": device.units if device.kind == "cpu" else 1,
            "dtype": given["dtype"] or usual_dtype(device),
            "cold": not given["hot"],
        }
    )


@contextlib.contextmanager
def watched(results: Path) -> Iterator[Progress]:
    """Show what is measured. Ctrl-C, or being told to end, ends what was started, and says how to
    go on.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    try:
        with console.status("starting", spinner="line") as status:
            yield lambda what, done, total: status.update(f"{what} ({done + 1} of {total})")
    except KeyboardInterrupt:
        newest = max(results.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
        go_on = f": go on with --resume {newest}" if newest else ""
        console.print(f"interrupted{go_on}", soft_wrap=True)
        sys.exit(130)
