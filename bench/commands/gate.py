"""`vqbench gate`: is the candidate slower than the baseline, here and now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bench.gate.asked import asked, asking, watched
from bench.gate.decide import Rules
from bench.gate.noise import load
from bench.gate.plan import plan_text
from bench.gate.render import check_targets, text, write_reports
from bench.gate.run import Options, run_gate
from bench.gate.thresholds import Thresholds, load_thresholds

__all__ = ["command"]


@click.command("gate")
@click.option(
    "--baseline",
    help="Git revision, checkout, virtual environment, or results (.jsonl: advisory).",
)
@click.option("--candidate", help="The same, but results; else the working tree, or what runs.")
@asking
@click.option("--config", "configs", multiple=True, help="Candidate's: kernel:name=value,...")
@click.option("--baseline-config", "baseline_configs", multiple=True, help="The baseline's.")
@click.option("--slow", default=0.0, type=click.FloatRange(0), help="Delay the candidate by %.")
@click.option("--thresholds", type=click.Path(path_type=Path), help="TOML file of thresholds.")
@click.option("--strict", is_flag=True, help="INCONCLUSIVE fails too, with exit code 4.")
@click.option(
    "--md",
    type=click.Path(path_type=Path),
    help="Write it as Markdown; appended to GitHub's step summary.",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write it as JUnit XML.")
@click.option("--json", type=click.Path(path_type=Path), help="Write it as JSON.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and what it can see.")
def command(**given: Any) -> None:
    """Measure two versions of the kernels against one another; fail where one became slower.

    Both run in pairs of fresh processes that sample in turns, with the same measuring code; what
    looks slower is measured once more. Exit codes: 0 pass, 1 slower, 2 usage, 3 wrong results, 4 no
    verdict possible. `vqbench selfcheck` tells the gate how noisy each case is here.
    """
    differing = ("baseline", "candidate", "configs", "baseline_configs", "slow", "resume")
    if not any(given[name] for name in differing):
        raise click.UsageError("name what to compare with: --baseline REVISION|FOLDER|FILE.jsonl")
    reports = {form: given[form] for form in ("md", "junit", "json") if given[form] is not None}
    check_targets(reports)
    options = asked({**given, "slow": given["slow"] / 100})
    rules = _rules(given, options)
    if given["dry_run"]:
        click.echo(plan_text(options, rules))
        return
    results = given["results"] / options.where.slug
    with watched(results) as progress:
        report = run_gate(
            options,
            rules,
            results,
            strict=given["strict"],
            resume=given["resume"],
            progress=progress,
        )
    click.echo(text(report), nl=False)
    write_reports(report, reports)
    sys.exit(report.exit_code)


def _rules(given: dict[str, Any], options: Options) -> Rules:
    path: Path | None = given["thresholds"]
    return Rules(
        thresholds=Thresholds() if path is None else load_thresholds(path),
        noise=load(given["noise"], options.where),
    )
