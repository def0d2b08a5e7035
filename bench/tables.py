"""Rows as a terminal table, Markdown, CSV or JSON: the one way every command prints."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["OUTPUTS", "render"]

OUTPUTS = ("table", "md", "csv", "json", "jsonl")

Row = Mapping[str, Any]

# What is set to the right: numbers, also those that a command wrote with its own digits.
_NUMBER = re.compile(r"-|[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?")


def render(rows: Sequence[Row], columns: Mapping[str, str] | None, output: str) -> str:
    """`rows` in the form that `output` names.

    columns: key and heading of what a table or Markdown shows, in order; None: every key. The
    machine forms carry all keys and full precision.
    """
    if output == "json":
        return json.dumps([dict(row) for row in rows], indent=2)
    if output == "jsonl":
        return "".join(json.dumps(dict(row)) + "\n" for row in rows)
    if output == "csv":
        # as objects: pandas would turn whole numbers with a gap among them into 1.0, 2.0
        frame = pd.DataFrame([dict(row) for row in rows], dtype=object)
        return frame.to_csv(index=False).rstrip("\n")
    shown = columns or {key: key for key in (rows[0] if rows else {})}
    cells = [[_cell(row.get(key)) for key in shown] for row in rows]
    if output == "md":
        return _markdown(list(shown.values()), cells)
    numeric = [all(_NUMBER.fullmatch(line[at]) for line in cells) for at in range(len(shown))]
    return _table(list(shown.values()), cells, numeric)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [list(headings), ["---"] * len(headings), *cells]
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in escaped)


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, right in zip(headings, numeric, strict=True):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    # wide enough for every column: a table that is piped or pasted must not lose digits
    console = Console(file=io.StringIO(), width=400, highlight=False, markup=False, emoji=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    return "\n".join(line.rstrip() for line in str(text).splitlines())
