"""`vqbench tune`: the best kernel and config for each product on this device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autotune import tune as loop
from autotune.bandwidth import measure_bandwidth
from autotune.store import Store
from autotune.strategies import DEFAULT, strategies
from autotune.timers import Budget
from bench import tuning
from bench.environment import describe_host
from bench.options import selecting, usual_dtype, where
from bench.selection import Selection, matching_kernels
from bench.tables import OUTPUTS, render
from vqkernels.device import Device

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
@click.option("--pairs", default=7, type=click.IntRange(2), help="Of the confirmation.")
@click.option("--time", "seconds", default=0.1, help="Seconds of samples an attempt.")
@click.option("--seed", default=0, help="Of weights, tokens and the search.")
@click.option("--store", "url", help="Where attempts go: a database URL; see VQBENCH_STORE.")
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
    output: str,
) -> None:
    """Search kernels and configs for each distinct shape, format and m.

    Each attempt is checked against the oracle before it is timed, in a process that may crash or
    hang. The winner is held against the default in pairs of fresh processes; `vqbench export`
    writes what was faster into a table that vq_linear then uses. Run again, it goes on where it
    ended.
    """
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
    done, interrupted = _run(todo, kernels, chosen, store, plan, Budget(seconds=seconds), console)
    click.echo(render(list(tuning.rows(done)), _COLUMNS, output))
    console.print(f"attempts: {store.url}; `vqbench export` makes them a tuned table")
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
    console: Console,
) -> tuple[list[tuning.Tuned], bool]:
    """Every job in turn, with a bar a job; and whether Ctrl-C ended them."""
    chosen = matching_kernels(kernels, device)
    bandwidth = measure_bandwidth(device)
    done: list[tuning.Tuned] = []
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        for number, job in enumerate(todo, 1):
            show = _shower(bar, f"{number}/{len(todo)} {job}")
            try:
                one = tuning.tune_job(job, chosen, device, store, plan, budget, bandwidth, show)
            except KeyboardInterrupt:
                return done, True
            done.append(one)
            console.print(_line(one), soft_wrap=True)
    return done, False


def _shower(bar: Progress, title: str) -> Callable[[loop.Progress], None]:
    """What a job's progress does to the bar: its stage, and the best so far."""
    task = bar.add_task(title, total=None)

    def show(now: loop.Progress) -> None:
        best = ""
        if now.best is not None and now.best_s is not None:
            best = f", best {now.best.kernel} {now.best_s * 1e6:.4g} us"
        bar.update(
            task, description=f"{title}: {now.stage}{best}", completed=now.done, total=now.total
        )

    return show


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
