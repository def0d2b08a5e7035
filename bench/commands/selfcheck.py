"""`vqbench selfcheck`: how often the gate is wrong on this machine, and how noisy its cases are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.gate import noise, simulate
from bench.gate.asked import asked, asking, watched
from bench.gate.selfcheck import Selfcheck, run_selfcheck
from bench.tables import OUTPUTS, render

__all__ = ["command"]


@click.command("selfcheck")
@asking
@click.option(
    "--rounds", default=10, type=click.IntRange(2), help="Calls of a side against itself."
)
@click.option("--slow-rounds", default=3, type=click.IntRange(0), help="Calls a slowdown.")
@click.option(
    "--slow",
    "effects",
    multiple=True,
    default=(3.0, 5.0, 8.0),
    type=click.FloatRange(0, min_open=True),
    help="Slowdown in %; repeat for several.",
)
@click.option("--simulate", "trials", type=click.IntRange(1), help="Simulate so many calls.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    rounds: int,
    slow_rounds: int,
    effects: tuple[float, ...],
    trials: int | None,
    output: str,
    **given: Any,
) -> None:
    """Measure how often `vqbench gate` is wrong here, and store how noisy each case is.

    Each call is a gate's: of the kernels against themselves, where REGRESSED is false, and against
    themselves with every call delayed by so many %, where nothing else is right. The gate reads the
    noise of each case from what this stores. With --simulate nothing is measured: the same rule
    judges times that are drawn at random.
    """
    if trials is not None:
        click.echo(_simulated(trials, given["seed"], output))
        return
    options = asked(given)
    results: Path = given["results"] / options.where.slug
    shares = [one / 100 for one in effects]
    with watched(results) as progress:
        found = run_selfcheck(
            options,
            shares,
            rounds,
            slow_rounds,
            results,
            resume=given["resume"],
            progress=progress,
        )
    file = noise.save(found.noise, given["noise"])
    click.echo(_table(found, output))
    for reason, count in found.doubts.items():
        click.echo(f"doubt in {count} comparisons: {reason}", err=True)
    click.echo(f"records: {found.records}", err=True)
    click.echo(f"noise of each case, for `vqbench gate`: {file}", err=True)


_COLUMNS = {
    "slower": "slowed by",
    "floors": "noise floors",
    "comparisons": "comparisons",
    "regressed": "REGRESSED",
    "regressed_range": "95 %",
    "inconclusive": "INCONCLUSIVE",
    "pass": "PASS",
    "faster": "FASTER",
}
_SIMULATED = {
    "between": "between processes",
    "effect": "slowed by",
    "trials": "calls",
    "regressed": "REGRESSED",
    "regressed_range": "95 %",
    "inconclusive": "INCONCLUSIVE",
    "pass": "PASS",
    "faster": "FASTER",
}


def _table(found: Selfcheck, output: str) -> str:
    return _render(list(found.rows), _COLUMNS, output)


def _simulated(trials: int, seed: int, output: str) -> str:
    """One case a call, a drift of 3 %, samples that differ by 1 % within a process."""
    return _render(list(simulate.rows(trials, seed)), _SIMULATED, output)


def _render(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], output: str) -> str:
    """Shares as percent for people, as they are for machines."""
    if output in ("table", "md"):
        rows = [_percents(row) for row in rows]
    return render(rows, columns, output).rstrip("\n")


def _percents(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = (100 * row[f"regressed_{end}"] for end in ("low", "high"))
    shares = ("slower", "effect", "between", "regressed", "inconclusive", "pass", "faster")
    return {
        **row,
        **{name: f"{100 * row[name]:.3g} %" for name in shares if name in row},
        "regressed_range": f"{low:.3g} to {high:.3g} %",
    }
