"""`vqbench run`: measure verified kernels on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autotune.bandwidth import Bandwidth, measure_bandwidth
from autotune.timers import Budget
from bench import report
from bench.model import model_selection
from bench.options import selecting, usual_dtype, where
from bench.records import RecordFile
from bench.run import Plan, failures, header, run_plan
from bench.selection import matching_kernels, selections
from bench.tables import OUTPUTS, render
from vqkernels.device import Device

__all__ = ["command"]


@click.command("run")
@selecting
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A stored model: container, imported folder or checkpoint.",
)
@click.option("--seed", default=0, help="Of activations, synthetic weights and the quantizer.")
@click.option("--time", "seconds", default=0.1, help="Seconds of samples a case.")
@click.option("--samples", default=200, type=click.IntRange(7), help="At most so many samples.")
@click.option("--hot", is_flag=True, help="Measure with the weight in cache; marked so.")
@click.option("--results", default="results", type=click.Path(path_type=Path), help="Folder.")
@click.option("--all-layers", is_flag=True, help="A row a layer instead of a row a shape.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    workloads: tuple[str, ...],
    layers: tuple[str, ...],
    fuse: bool,
    formats: tuple[str, ...],
    kernels: tuple[str, ...],
    ms: tuple[int, ...],
    device: str,
    threads: int | None,
    dtype: str | None,
    model: Path | None,
    seed: int,
    seconds: float,
    samples: int,
    hot: bool,
    results: Path,
    all_layers: bool,
    output: str,
) -> None:
    """Measure lookup+GEMM kernels: each is checked against a float64 oracle, then timed.

    Without options: every linear layer of MiniLM (real weights, quantised on the spot) at
    rq-2x256x8, and two layers of LLaMA-2 7B in every format of up to 256 entries. With --model, the
    matrices of a stored model with the codes and in the format that they have: one of each kind
    (last part of the name, shape, format), or those that --layer names. Records go to
    RESULTS/<device>/; the table to standard output. Ctrl-C keeps what is done.
    """
    if model is not None and (workloads or formats):
        raise click.UsageError("--model is a workload with formats of its own; drop -w and -f")
    chosen = where(device, threads)
    if model is None:
        selected = selections(workloads, layers, formats, ms, fuse)
    else:
        selected = (model_selection(model, layers, ms, fuse=fuse),)
    plan = Plan(
        selections=selected,
        kernels=tuple(matching_kernels(kernels, chosen)),
        device=chosen,
        dtype=dtype or usual_dtype(chosen),
        seed=seed,
        budget=Budget(seconds=seconds, max_samples=samples),
        cold=not hot,
    )
    # what is printed is data (names, reasons, paths): no markup, no emoji, no colours
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    for one in plan.selections:
        if one.model is not None:
            console.print(f"{one.workload}: {one.model.about}", soft_wrap=True)
    records, path, interrupted = _execute(plan, results / chosen.slug, console)
    _print(records, output, all_layers=all_layers)
    _explain(records, path, console)
    if interrupted:
        console.print("interrupted: the cases above are kept")
        sys.exit(130)
    sys.exit(1 if failures(records) else 0)


def _execute(plan: Plan, folder: Path, console: Console) -> tuple[list[dict[str, Any]], Path, bool]:
    """Run with a progress bar; returns the records, their file and whether Ctrl-C ended it."""
    size = plan.size
    console.print(_opening(plan.device), soft_wrap=True)
    bandwidth = measure_bandwidth(plan.device)
    console.print(_memory_line(bandwidth), soft_wrap=True)
    with (
        RecordFile(folder, header(plan.device, bandwidth, plan.budget)) as file,
        Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bar,
    ):
        task = bar.add_task("starting", total=size)
        try:
            for _ in run_plan(
                plan, bandwidth, file, lambda text: bar.update(task, description=text)
            ):
                bar.advance(task)
        except KeyboardInterrupt:
            return file.records, file.path, True
    return file.records, file.path, False


def _opening(device: Device) -> str:
    unit = "threads" if device.kind == "cpu" else "multiprocessors"
    return f"{device.name} ({device.arch}), {device.units} {unit}"


def _memory_line(bandwidth: Bandwidth) -> str:
    return (
        f"memory reads at {bandwidth.median / 1e9:.1f} GB/s "
        f"(best {bandwidth.best / 1e9:.1f}), measured now"
    )


def _print(records: Sequence[dict[str, Any]], output: str, *, all_layers: bool) -> None:
    if output == "jsonl":
        click.echo(render(records, None, output), nl=False)
        return
    merged = output in ("table", "md") and not all_layers
    rows = report.summary_rows(records) if merged else report.detail_rows(records)
    click.echo(render(rows, report.COLUMNS, output))


def _explain(records: Sequence[dict[str, Any]], path: Path, console: Console) -> None:
    """How it ended, on standard error: counts, refusals, failures, conditions, the file."""
    lines = [report.summary(records)]
    lines += [f"  {count} x {line}" for line, count in report.refusals(records).items()]
    lines += [
        f"  FAILED {record['workload']} {record['layer']} {record['format']} "
        f"m={record['m']} {record['kernel']}: {record['status']}: {record['reason']}"
        for record in failures(records)
    ]
    lines += report.conditions(records)
    if records:
        lines.append(f"records: {path}")
    console.print("\n".join(lines), soft_wrap=True)
