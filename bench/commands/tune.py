"""`vqbench tune`: the best kernel and config for each product on this device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from autotune import tune as loop
from autotune.bandwidth import measure_bandwidth
from autotune.store import Store
from autotune.strategies import DEFAULT, strategies
from autotune.timers import Budget
from bench import plots, tuning
from bench.environment import describe_host
from bench.options import selecting, usual_dtype, where
from bench.progress import Left, Pace, describe
from bench.selection import Selection, matching_kernels
from bench.tables import OUTPUTS, render
from vqkernels.device import Device
from vqkernels.errors import ContainerError

__all__ = ["command"]

_COLUMNS = {
    "layer": "layer",
    "format": "format",
    "m": "m",
    "default": "default",
    "default_us": "us",
    "winner": "winner",
    "winner_us": "us",
    "speedup": "x default",
    "at_least": "at least",
    "verdict": "verdict",
    "attempts": "attempts",
    "failed": "failed",
    "pruned": "pruned",
    "config": "config",
}


@click.command("tune")
@selecting
@click.option("--attempts", default=100, type=click.IntRange(1), help="Configs tried a product.")
@click.option("--minutes", type=float, help="At most so long a search.")
@click.option("--strategy", default=DEFAULT, type=click.Choice([*strategies()]), help="Of search.")
@click.option("--pairs", default=15, type=click.IntRange(2), help="Of the confirmation.")
@click.option("--time", "seconds", default=0.1, help="Seconds of samples an attempt.")
@click.option("--seed", default=0, help="Of weights, tokens and the search.")
@click.option("--store", "url", help="Where attempts go: a database URL; see VQBENCH_STORE.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Plots of each search go here.",
)
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
    attempts: int,
    minutes: float | None,
    strategy: str,
    pairs: int,
    seconds: float,
    seed: int,
    url: str | None,
    plot: Path | None,
    output: str,
) -> None:
    """Search kernels and configs for each distinct shape, format and m.

    Each attempt is checked against the oracle before it is timed, in a process that may crash or
    hang. The winner is held against the default in pairs of fresh processes; `vqbench export`
    writes what was faster into a table that vq_linear then uses. Run again, it goes on where it
    ended.
    """
    if plot is not None:
        plots.prepare(plot)
    chosen = where(device, threads)
    selections = [
        Selection(
            workload=name,
            layers=tuple(layers) or ("*",),
            formats=tuple(formats) or ("aqlm-2x8",),
            ms=tuple(ms) or (1,),
            fuse=fuse,
        )
        for name in workloads or ("llama2-7b",)
    ]
    wanted = dtype or usual_dtype(chosen)
    todo, refused = tuning.jobs(selections, chosen, wanted, seed=seed, cold=True)  # type: ignore[arg-type]  # click checked the choice
    plan = loop.Plan(
        strategy=strategy,
        seed=seed,
        attempts=attempts,
        seconds=None if minutes is None else 60 * minutes,
        pairs=pairs,
    )
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    for line in refused:
        console.print(f"! {line}", soft_wrap=True)
    store = Store(url, stamp=describe_host(chosen))
    budget = Budget(seconds=seconds)
    done, interrupted = _run(todo, kernels, chosen, store, plan, budget, plot, console)
    click.echo(render(list(tuning.rows(done)), _COLUMNS, output))
    if done:
        console.print(_spent(done), soft_wrap=True)
    console.print(
        f"attempts: {store.url}; `vqbench export` makes them a tuned table", soft_wrap=True
    )
    if plot is not None:
        console.print(f"plots: {plot}", soft_wrap=True)
    if interrupted:
        console.print("interrupted: every attempt that ended is kept; run it again to go on")
        sys.exit(130)


def _run(
    todo: Sequence[tuning.Job],
    kernels: Sequence[str],
    device: Device,
    store: Store,
    plan: loop.Plan,
    budget: Budget,
    plot: Path | None,
    console: Console,
) -> tuple[list[tuning.Tuned], bool]:
    """Every job in turn, with a bar a job; and whether Ctrl-C ended them."""
    chosen = matching_kernels(kernels, device)
    bandwidth = measure_bandwidth(device)
    done: list[tuning.Tuned] = []
    with Progress(
        # wraps on a narrow terminal, where the figures beside it would go otherwise
        TextColumn("{task.description}", markup=False, table_column=Column()),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        Left(),
        console=console,
        transient=True,
    ) as bar:
        for number, job in enumerate(todo, 1):
            show = _shower(bar, f"{number}/{len(todo)} {job}", plan)
            try:
                one = tuning.tune_job(job, chosen, device, store, plan, budget, bandwidth, show)
            except KeyboardInterrupt:
                return done, True
            done.append(one)
            bar.remove_task(bar.task_ids[0])
            console.print(_line(one), soft_wrap=True)
            if plot is not None:
                _plot(one, device, store, plot, console)
    return done, False


def _shower(bar: Progress, title: str, plan: loop.Plan) -> Callable[[loop.Progress], None]:
    """What a job's progress does to the bar: its stage, the best so far, and the stage's end."""
    task, pace = bar.add_task(title, total=None), Pace(plan.seconds)

    def show(now: loop.Progress) -> None:
        bar.update(
            task,
            description=f"{title}: {describe(now)}",
            completed=now.done,
            total=now.total,
            end_s=pace.end_s(now),
        )

    return show


def _spent(done: Sequence[tuning.Tuned]) -> str:
    """Where the time went."""
    whole = sum(one.seconds for one in done)
    steps = {step: sum(one.steps_s.get(step, 0.0) for one in done) for step in tuning.MEASURING}
    shares = ", ".join(f"{step} {seconds / whole:.1%}" for step, seconds in steps.items())
    outside = sum(one.outside_s for one in done) / whole
    return f"{whole:.0f} s: {shares}, all else {outside:.1%}"


def _plot(one: tuning.Tuned, device: Device, store: Store, folder: Path, console: Console) -> None:
    """A job's plots; a full disk costs them alone, not the jobs that follow."""
    try:
        plots.save(store, one, device, folder)
    except ContainerError as error:
        console.print(f"! {error}", soft_wrap=True)


def _line(one: tuning.Tuned) -> str:
    result = one.result
    if not result.faster:
        why = "nothing was faster" if result.judgement is None else result.judgement.reason
        return f"{one.job}: the default stays ({result.baseline.kernel}): {why}"
    assert result.judgement is not None, "what is faster was judged"
    return (
        f"{one.job}: {result.winner.kernel} {1 / result.judgement.ratio:.2f}x the default "
        f"({result.baseline.kernel}), at least {1 / result.judgement.high:.2f}x"
    )
