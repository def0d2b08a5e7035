"""A gate's report for a terminal, a step summary and machines, and into files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import tables
from bench.gate import junit, wording
from bench.gate.outcome import Outcome, Report
from vqkernels.atomic import write_atomically
from vqkernels.errors import ContainerError, VqError

__all__ = ["FORMS", "check_targets", "json_text", "markdown", "text", "write_reports"]

_COLUMNS = {
    "case": "case",
    "baseline": "baseline us",
    "candidate": "candidate us",
    "ratio": "ratio",
    "low": "at least",
    "high": "at most",
    "smallest": "detectable %",
    "verdict": "verdict",
}

# Lists longer than this are folded in Markdown; so are more rows that say nothing went wrong.
_FOLD = 10

# What Markdown or GitHub gives a meaning within a line; `tables` sees to the bar between cells.
_SPECIAL = re.compile(r"[\\`*_\[\]<&~#$!]")


def _row(one: Outcome) -> dict[str, Any]:
    return {
        "case": wording.plain(one.name),
        "baseline": None if one.baseline_s is None else one.baseline_s * 1e6,
        "candidate": None if one.candidate_s is None else one.candidate_s * 1e6,
        "ratio": _ratio(one.ratio),
        "low": _ratio(one.low),
        "high": _ratio(one.high),
        "smallest": None if one.smallest is None else f"{100 * (one.smallest - 1):,.1f}",
        "verdict": wording.label(one),
    }


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _heading(report: Report) -> list[str]:
    sides = (
        f"candidate {wording.plain(report.candidate)}, baseline {wording.plain(report.baseline)}"
    )
    where = f" on {wording.plain(report.host)}" if report.host else ""
    return [sides, f"{wording.plain(report.device)}{where}, {report.seconds:.0f} s"]


def _counts(report: Report) -> str:
    found = [f"{count} {word}" for word, count in wording.counts(report).items()]
    found += [f"{len(report.skipped)} skipped"] if report.skipped else []
    return f"{_cases(len(report.outcomes))}: {', '.join(found) or 'none'}"


def text(report: Report) -> str:
    """For a terminal: the table, every reason below it, and last what it comes to."""
    lines = _heading(report)
    if report.advisory:
        lines.append(wording.ADVICE)
    rows = [_row(one) for one in wording.ordered(report)]
    if rows:
        lines.append(tables.render(rows, _COLUMNS, "table").rstrip("\n"))
    lines += [
        f"{wording.label(one)} {wording.plain(one.name)}: {wording.reason(one)}"
        for one in wording.explained(report)
    ]
    lines.append(_counts(report))
    lines += [
        f"  skipped {len(names)} x {why}: {wording.listed(names)}"
        for why, names in wording.skipped(report).items()
    ]
    lines += [f"  doubt in {_cases(n)}: {doubt}" for doubt, n in wording.doubts(report).items()]
    lines += [f"note: {wording.plain(note)}" for note in report.notes]
    if report.records:
        lines.append(f"records: {wording.plain(report.records)}")
    if report.advisory:
        lines.append(wording.ADVICE)  # again: the table may be long
    lines.append(wording.closing(report))
    return "\n".join(lines) + "\n"


def _cases(count: int) -> str:
    return f"{count} case{'s' if count != 1 else ''}"


def markdown(report: Report) -> str:
    """GitHub's Markdown, for a step summary: what it comes to first, long lists folded."""
    blocks = [
        f"## vqbench gate: {wording.meaning(report)}",
        f"**{_escaped(wording.closing(report))}**",
    ]
    if report.advisory:
        blocks.append(f"> **{_escaped(wording.ADVICE)}**")
    blocks.append("<br>\n".join(_escaped(line) for line in _heading(report)))
    blocks += _tables(report)
    reasons = [
        f"- {wording.label(one)} {_code(one.name)}: {_escaped(wording.reason(one))}"
        for one in wording.explained(report)
    ]
    blocks += _folded("reasons", reasons)
    blocks.append(_escaped(_counts(report)))
    for why, names in wording.skipped(report).items():
        heading = f"skipped {len(names)} x {why}"
        blocks += _folded(heading, [f"- {_code(name)}" for name in names], always=True)
    found = wording.doubts(report)
    blocks += _folded(
        "doubts", [f"- doubt in {_cases(n)}: {_escaped(doubt)}" for doubt, n in found.items()]
    )
    blocks += _folded("notes", [f"- note: {_escaped(note)}" for note in report.notes])
    if report.records:
        blocks.append(f"records: {_code(report.records)}")
    return "\n\n".join(blocks) + "\n"


def _tables(report: Report) -> list[str]:
    """All cases, or where they are many the quiet ones folded away below the others."""
    cases = wording.ordered(report)
    loud = [one for one in cases if wording.label(one) not in ("PASS", "IDENTICAL")]
    quiet = cases[len(loud) :]  # in the order of `wording.ORDER` they are the last
    if len(quiet) <= _FOLD:
        return [_table(cases)] if cases else []
    folded = _details(f"{len(quiet)} cases PASS or IDENTICAL", _table(quiet))
    return [_table(loud), folded] if loud else [folded]


def _table(cases: list[Outcome]) -> str:
    rows = [_row(one) | {"case": _code(one.name)} for one in cases]
    return tables.render(rows, _COLUMNS, "md")


def _folded(summary: str, lines: list[str], *, always: bool = False) -> list[str]:
    """A list; folded where it is long. No block where it is empty."""
    if not lines:
        return []
    block = "\n".join(lines)
    return [_details(summary, block)] if always or len(lines) > _FOLD else [block]


def _details(summary: str, block: str) -> str:
    # blank lines: Markdown within HTML is read as such only as blocks of its own
    return f"<details><summary>{_html(summary)}</summary>\n\n{block}\n\n</details>"


def _escaped(data: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", wording.plain(data))


def _code(name: str) -> str:
    """A name: in it GitHub looks for no mention, issue or emoji."""
    return f"<code>{_escaped(name)}</code>"


def _html(data: str) -> str:
    """Data inside a line of HTML, which Markdown leaves alone."""
    return wording.plain(data).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def json_text(report: Report) -> str:
    """All fields; ratios that are infinite are null, since JSON has no such number."""
    return json.dumps(_finite(report.to_dict()), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


FORMS: dict[str, Callable[[Report], str]] = {
    "text": text,
    "md": markdown,
    "junit": junit.xml,
    "json": json_text,
}


def check_targets(targets: Mapping[str, Path]) -> None:
    """Raise ContainerError for a file that can't be written, before a gate spends its minutes."""
    seen: set[Path] = set()
    for path in targets.values():
        if path.is_dir():
            raise ContainerError(f"{path}: is a folder: give the name of a file in it")
        if not path.parent.is_dir():
            raise ContainerError(f"{path}: there is no folder {path.parent}: make it first")
        if not os.access(path if path.exists() and _shared(path) else path.parent, os.W_OK):
            raise ContainerError(f"{path}: can't be written: choose a folder that you may write to")
        if path.absolute() in seen:
            raise ContainerError(f"{path}: named for two reports: give each a file of its own")
        seen.add(path.absolute())


def write_reports(report: Report, targets: Mapping[str, Path]) -> None:
    """Write the report to each path in its form (a key of `FORMS`), whole or not at all.

    GitHub's step summary, which other steps write to, and what is no regular file (a pipe) are
    appended to. What can be written is, before the first error is raised: ContainerError.
    """
    errors: list[VqError] = []
    for form, path in targets.items():
        data = FORMS[form](report).encode("utf-8")
        try:
            if _shared(path):
                _append(path, data)
            else:
                write_atomically(path, [data])
        except VqError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _shared(path: Path) -> bool:
    if path.exists() and not path.is_file():
        return not path.is_dir()
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    return bool(summary) and path.absolute() == Path(str(summary)).absolute()


def _append(path: Path, data: bytes) -> None:
    try:
        with path.open("ab", buffering=0) as file:
            start = file.tell() if path.is_file() else 0
            try:
                rest = data
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                if path.is_file():
                    file.truncate(start)  # no half report behind what others wrote
                raise
    except OSError as error:
        raise ContainerError(
            f"{path}: can't be appended to: {error.strerror}; free space or name another file"
        ) from error
