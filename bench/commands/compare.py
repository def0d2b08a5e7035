"""`vqbench compare`: tables over results files, and how far they agree."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from autotune.measurement import Status
from bench.compare.match import SORTS, Comparison, against, compare, select
from bench.compare.report import BY, case_rows, case_table, group_rows, group_table, legend, notes
from bench.compare.series import Filters, load_sources
from bench.tables import OUTPUTS, render

__all__ = ["command"]


@click.command("compare")
@click.argument(
    "paths", metavar="RESULTS...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("-w", "--workload", "workloads", multiple=True, help="Workloads by glob.")
@click.option("-l", "--layer", "layers", multiple=True, help="Layers by glob, e.g. '*.query'.")
@click.option("-f", "--format", "formats", multiple=True, help="Formats by glob, e.g. 'rq-*'.")
@click.option("-k", "--kernel", "kernels", multiple=True, help="Kernels by glob: 'numba/*'.")
@click.option("-m", "ms", multiple=True, type=click.IntRange(1), help="Tokens; repeat for several.")
@click.option("--dtype", "dtypes", multiple=True, help="Of activations; repeat for several.")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([*get_args(Status), "absent"]),
    help="Cases that ended so in some file, with the reason.",
)
@click.option("--against", "reference", metavar="KERNEL", help="Ratios to this kernel, run by run.")
@click.option("--by", multiple=True, type=click.Choice(BY), help="A geometric mean for each.")
@click.option("--summary", is_flag=True, help="The geometric means alone.")
@click.option("--sort", type=click.Choice(SORTS), default="run", help="Order of the cases.")
@click.option("--anyway", is_flag=True, help="Compare what isn't comparable; marked so.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    paths: tuple[Path, ...],
    workloads: tuple[str, ...],
    layers: tuple[str, ...],
    formats: tuple[str, ...],
    kernels: tuple[str, ...],
    ms: tuple[int, ...],
    dtypes: tuple[str, ...],
    statuses: tuple[str, ...],
    reference: str | None,
    by: tuple[str, ...],
    summary: bool,
    sort: str,
    anyway: bool,
    output: str,
) -> None:
    """Set results files or folders of them side by side; the first is the base.

    A row a case, with each file's median and the ratio of its time to the base's, then geometric
    means of the ratios. The two sides of a gate's file count as two files. With --against, ratios
    to a kernel that ran in the same run instead, in each file by itself.

    Cases are matched by workload, layer, format, n, k, m and kernel. They are compared where
    device, threads, pinning, timer, cache of each operand, dtype, distribution of codes and spec
    agree; anything else is refused unless --anyway. Noted and not refused: another GPU of that
    model, driver, power limit, versions, commit, seed, and the kernel's code and config. Where a
    folder has several codes or configs of a case, those that both sides have meet, then the newest.

    Intervals are of 95 %. Of a median: by order statistics of its samples; several records of a
    case are pooled as the median of their medians, with the interval of these (6 records or more).
    Of a ratio: from the intervals of both medians; where there are pairs, of a gate or of a kernel
    and --against in several runs, that of the median of the pairs' ratios. Of a geometric mean:
    Student's t of the logarithms, as if the cases were drawn at random.

    Samples of one process are not independent, and another process may differ by more: such an
    interval is of its run alone. `vqbench gate` decides whether something got slower.
    """
    filters = Filters(
        workloads=workloads,
        layers=layers,
        formats=formats,
        kernels=kernels,
        ms=ms,
        dtypes=dtypes,
        reference=reference,
    )
    sources = load_sources(paths, filters)
    if (by or summary) and len(sources) == 1 and not reference:
        raise click.UsageError("--by and --summary are of ratios: name two files, or --against")
    if reference:
        found = [against(source, reference) for source in sources]
    else:
        found = [compare(sources, anyway=anyway)]
    found = [select(one, statuses, sort) for one in found]
    groups = by or (("kernel",) if reference else ())
    if output in ("table", "md"):
        click.echo(
            "\n\n".join(_text(one, groups, output, summary, bool(statuses)) for one in found)
        )
        return
    rows = [
        row for one in found for row in (group_rows(one, groups) if summary else case_rows(one))
    ]
    click.echo(render(rows, None, output), nl=output != "jsonl")
    for line in (line for one in found for line in notes(one)):
        click.echo(line, err=True)


def _text(
    found: Comparison, by: tuple[str, ...], output: str, summary: bool, statuses: bool
) -> str:
    """Legend, cases, geometric means and notes, with an empty line between them."""
    parts = [
        _lines(legend(found), output),
        "" if summary else case_table(found, output, statuses=statuses),
        group_table(found, by, output),
        _lines(notes(found), output),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _lines(lines: list[str], output: str) -> str:
    """Lines, which Markdown would make one paragraph, as a list there."""
    return "\n".join(f"- {line}" if output == "md" else line for line in lines)
