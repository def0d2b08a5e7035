"""`vqbench gpu-check`: every kernel right on this GPU, then how fast, in one command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import gpu_check, report
from bench.goals import goal_lines
from bench.gpu_tasks import Site
from bench.peers import peers
from bench.records import RecordFile
from bench.run import failures, header
from bench.selection import matching_kernels
from bench.tables import OUTPUTS, render
from bench.workload import load_workload
from vqkernels.device import Device, detect
from vqkernels.errors import BackendError
from vqkernels.kernel import Kernel
from vqkernels.presets import parse_format

__all__ = ["command"]

_FORMATS = ("aqlm-2x8", "aqlm-1x16", "vptq-65536-256")

# Of the time, where both parts run: the rest is for the timing.
_CORRECTNESS_SHARE = 0.55

_COLUMNS = {
    "layer": "layer",
    "format": "format",
    "m": "m",
    "kernel": "kernel",
    "timer": "timer",
    "median_us": "median us",
    "spread_percent": "spread %",
    "bandwidth_percent": "bandwidth %",
    "speedup": "x dense",
}


@click.command("gpu-check")
@click.option("--only", type=click.Choice(["correctness", "timing"]), help="One part.")
@click.option("-k", "--kernel", "kernels", multiple=True, help="Kernels by glob, e.g. 'triton/*'.")
@click.option("-w", "--workload", default="llama3-70b", help="What is timed: name or .toml file.")
@click.option("-f", "--format", "formats", multiple=True, default=_FORMATS, help="Timed formats.")
@click.option(
    "-m", "ms", multiple=True, type=click.IntRange(1), default=(1, 8, 2048, 16), help="Timed."
)
@click.option("--minutes", default=9.0, help="No case is started later; it is recorded as not run.")
@click.option("--jobs", type=click.IntRange(1), help="Processes that check; one a core.")
@click.option("--device", default="auto", help="cuda, cuda:N; cpu to try the command out.")
@click.option("--seed", default=0, help="Of activations and weights.")
@click.option("--results", default="results", type=click.Path(path_type=Path), help="Folder.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Of the timing.")
def command(
    only: Literal["correctness", "timing"] | None,
    kernels: tuple[str, ...],
    workload: str,
    formats: tuple[str, ...],
    ms: tuple[int, ...],
    minutes: float,
    jobs: int | None,
    device: str,
    seed: int,
    results: Path,
    output: str,
) -> None:
    """Check every kernel on this GPU in every format at 1 to 2048 tokens, then time them.

    Timed beside cuBLAS, decode + cuBLAS and AQLM's kernels if installed, by events and in a CUDA
    graph, a layer at a time and as a decoder block, on cold weights. Records go to
    RESULTS/<device>/. Exit code 1: a case failed, or wasn't run in time.
    """
    start = time.monotonic()
    where = _detect(device)
    for name in formats:
        parse_format(name)  # before anything runs
    plan = gpu_check.Plan(
        site=Site(device=where, seed=seed),
        checked=() if only == "timing" else tuple(_checked(kernels, where)),
        timed=() if only == "correctness" else tuple(_timed(kernels, where)),
        workload=load_workload(workload),
        formats=formats,
        ms=ms,
        tokens=gpu_check.default_tokens(where),
        dtype="float32" if where.kind == "cpu" else "float16",
        jobs=jobs or (1 if where.kind == "cpu" else len(os.sched_getaffinity(0))),
    )
    # what is printed is data (names, reasons, paths): no markup, no emoji, no colours
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    records, path, interrupted = _execute(plan, start, 60 * minutes, results, console)
    _print(records, output)
    _explain(records, path, console, time.monotonic() - start)
    sys.exit(130 if interrupted else 1 if failures(records) else 0)


def _detect(name: str) -> Device:
    where = detect(name)
    if name == "auto" and where.kind == "cpu":
        raise BackendError(
            "gpu-check needs an NVIDIA GPU, and none answers here: check nvidia-smi and that torch "
            "and nvidia-ml-py see it (vqbench doctor), or try the command out with --device cpu"
        )
    return where


def _checked(patterns: tuple[str, ...], device: Device) -> list[Kernel]:
    return [kernel for kernel in matching_kernels(patterns, device) if kernel.reads != "dense"]


def _timed(patterns: tuple[str, ...], device: Device) -> list[Kernel]:
    """What is asked for, or all and the peers; the dense baseline in any case, and first."""
    chosen = matching_kernels((*patterns, "torch/dense") if patterns else (), device)
    if not patterns:
        chosen += [kernel for kernel in peers().values() if device.kind in kernel.runs_on]
    return chosen


def _execute(
    plan: gpu_check.Plan, start: float, seconds: float, results: Path, console: Console
) -> tuple[list[dict[str, Any]], Path, bool]:
    """Both parts with a progress line; the records, their file and whether Ctrl-C ended it."""
    where = plan.device
    bandwidth = gpu_check.measured_bandwidth(where)
    console.print(
        f"{where.name} ({where.arch}): memory reads at {bandwidth.median / 1e9:.1f} GB/s "
        f"(best {bandwidth.best / 1e9:.1f}), measured now",
        soft_wrap=True,
    )
    share = _CORRECTNESS_SHARE if plan.checked and plan.timed else 1.0
    columns = (TextColumn("{task.completed} cases"), BarColumn(), TimeElapsedColumn())
    with (
        RecordFile(
            results / where.slug, header(where, bandwidth, plan.budget), "gpu-check"
        ) as file,
        Progress(
            *columns,
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        ) as bar,
    ):
        task = bar.add_task("starting", total=None)

        def tell(text: str) -> None:
            bar.update(task, description=text)

        def parts() -> Iterator[dict[str, Any]]:
            yield from gpu_check.correctness(plan, file, start + share * seconds, tell)
            if plan.timed:
                yield from gpu_check.timing(plan, bandwidth, file, start + seconds, tell)

        try:
            for _ in parts():
                bar.advance(task)
        except KeyboardInterrupt:
            return file.records, file.path, True
    return file.records, file.path, False


def _print(records: list[dict[str, Any]], output: str) -> None:
    """The timing: for people what was timed, for machines all of it."""
    rows = report.detail_rows([one for one in records if one["workload"] != "conformance"])
    if output in ("table", "md"):
        rows = [row for row in rows if "median_us" in row]
    if rows:
        columns = _COLUMNS if output in ("table", "md") else None
        click.echo(render(rows, columns, output).rstrip("\n"))


def _explain(records: list[dict[str, Any]], path: Path, console: Console, seconds: float) -> None:
    """How it ended: counts, refusals with their reasons, failures, the goals, the file."""
    lines = [f"{report.summary(records)}; {seconds:.0f} s"]
    lines += [f"  {count} x {line}" for line, count in report.refusals(records).items()]
    late = [one for one in failures(records) if "not run: " in one["reason"]]
    lines += [
        f"  FAILED {one['layer']} {one['format']} m={one['m']} {one['dtype']} {one['kernel']}: "
        f"{one['status']}: {one['reason']}"
        for one in failures(records)
        if one not in late
    ]
    if late:
        lines.append(f"  {len(late)} cases not run: the time was over; give more --minutes")
    lines += goal_lines(records)
    if records:
        lines.append(f"records: {path}")
    console.print("\n".join(lines), soft_wrap=True)
