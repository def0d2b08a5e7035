"""From records to the table that a run ends with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.records import measurement_of
from bench.validity import doubts, forbids, grouped

__all__ = ["COLUMNS", "conditions", "detail_rows", "refusals", "summary", "summary_rows"]

Record = Mapping[str, Any]
Judge = Callable[[Record, Record], tuple[str, ...]]

COLUMNS = {
    "workload": "workload",
    "layer": "layer",
    "format": "format",
    "m": "m",
    "kernel": "kernel",
    "status": "status",
    "median_us": "median us",
    "spread_percent": "spread %",
    "bits": "bits/weight",
    "moved_mb": "moved MB",
    "bandwidth_percent": "bandwidth %",
    "speedup": "x dense",
    "weight_mb": "weight MB",
    "peak_mb": "call MB",
}


def detail_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a record, with what is derived from its samples.

    speedup: against the dense baseline on the same layer, format, m and dtype by the same timer
    in the same run.
    bandwidth_percent: bytes moved a second over the best rate at which this run read memory.
    """
    dense = {
        _case_key(record): measurement_of(record).median_s
        for record in records
        if record["kernel"] == "torch/dense" and record["status"] == "ok"
    }
    return [_row(record, dense.get(_case_key(record))) for record in records]


def summary_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Detail rows with layers of one shape merged: medians over the layers, refusals left out."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row, record in zip(detail_rows(records), records, strict=True):
        if row["status"] != "constraint":
            key = (row["workload"], row["n"], row["k"], row["format"], row["m"], row["kernel"])
            # one name is of several formats where it is the one that a layer is stored in
            spec = json.dumps(record.get("spec"), sort_keys=True)
            groups.setdefault((*key, spec, row["timer"], row["status"]), []).append(row)
    merged = [_merge(rows) for rows in groups.values()]
    order: dict[tuple[Any, ...], int] = {}
    for row in merged:
        order.setdefault(_subject_key(row), len(order))
    # subjects as they were run, kernels by speed
    return sorted(merged, key=lambda row: (order[_subject_key(row)], row.get("median_us", 0.0)))


def _subject_key(row: Record) -> tuple[Any, ...]:
    return (row["workload"], row["layer"], row["format"], row["m"])


def refusals(records: Sequence[Record]) -> dict[str, int]:
    """How many cases each `kernel: reason` refused, most first."""
    counts: dict[str, int] = {}
    for record in records:
        if record["status"] == "constraint":
            line = f"{record['kernel']}: {record['reason']}"
            counts[line] = counts.get(line, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def conditions(records: Sequence[Record]) -> list[str]:
    """Under which conditions cases ran: a line with how many are affected, then a line a reason.

    Empty where nothing was odd. A reason has the range of its numbers over the cases that share it.
    """
    tried = [record for record in records if record["status"] != "constraint"]
    counts, lines = [], []
    for judge, effect in ((forbids, "without a verdict"), (doubts, "in doubt")):
        found = [_reasons(judge, record) for record in tried]
        if any(found):
            counts.append(f"{sum(map(bool, found))} {effect}")
        lines += [f"  {count} {effect}: {reason}" for reason, count in grouped(found).items()]
    head = f"by the machine's state, of {len(tried)} cases: {', '.join(counts)}"
    return [head, *lines] if lines else []


def _reasons(judge: Judge, record: Record) -> tuple[str, ...]:
    state = record.get("state") or {}
    return judge(state.get("before") or {}, state.get("after") or {})


def summary(records: Sequence[Record]) -> str:
    """How the cases ended, in one line."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    words = {"constraint": "refused (reasons below)"}
    listed = ", ".join(f"{count} {words.get(status, status)}" for status, count in counts.items())
    return f"{len(records)} cases: {listed or 'none'}"


def _case_key(record: Record) -> tuple[Any, ...]:
    case = (record["workload"], record["layer"], record["format"], record["m"], record["dtype"])
    return (*case, _timer(record))


def _timer(record: Record) -> str | None:
    return record["timing"]["timer"] if record["timing"] else None


def _row(record: Record, dense_s: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: record[name] for name in ("workload", "layer", "n", "k", "format", "m", "kernel")
    }
    row |= {"status": record["status"], "reason": record["reason"], "timer": _timer(record)}
    row |= {"bits": record["effective_bits"], "stands_for": record.get("stands_for", 1)}
    if record["status"] != "ok":
        return row
    measured = measurement_of(record)
    median = measured.median_s
    moved = float(measured.moved_bytes or 0)
    return row | {
        "median_us": median * 1e6,
        "spread_percent": measured.spread * 100,
        "moved_mb": moved / 1e6,
        "bandwidth_percent": 100 * moved / median / record["bandwidth"]["best"],
        "speedup": dense_s / median if dense_s else None,
        "weight_mb": (measured.weight_bytes or 0) / 1e6,
        "peak_mb": None if measured.peak_bytes is None else measured.peak_bytes / 1e6,
    }


def _kind(rows: Sequence[dict[str, Any]]) -> str:
    """How many layers of the model the measured ones stand for, where these are not all."""
    count = sum(row["stands_for"] for row in rows)
    return f", for {count}" if count > len(rows) else ""


def _merge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    if len(rows) == 1:
        shape = f" {first['n']}x{first['k']}" if first["n"] else ""  # several layers: no one shape
        return first | {"layer": f"{first['layer']}{shape}{_kind(rows)}"}
    merged = dict(first) | {"layer": f"{len(rows)} of {first['n']}x{first['k']}{_kind(rows)}"}
    for name in COLUMNS:
        values = [value for row in rows if isinstance(value := row.get(name), float)]
        if values:
            merged[name] = statistics.median(values)
    return merged
