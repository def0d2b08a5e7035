"""Results files as series: what one source measured of a case, under one set of conditions.

A source is a file, a folder of files, or one side of a gate's file. A series pools the records of
one case, conditions, code and config: their median is the median of the records' medians.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.compare.intervals import Estimate, median
from bench.records import load_records
from vqkernels.errors import ContainerError, VqError

__all__ = ["Case", "Filters", "Series", "Source", "load_sources"]

Row = Mapping[str, Any]
# The run that a record is of (and in a gate its pair), and which one it is of several in that run.
Run = tuple[str, int]

# What tells the pairs in a gate's file apart.
_PAIR = ("call", "number", "pair")

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Case:
    """What two files are matched by; how it was measured is in a series' conditions."""

    workload: str
    layer: str
    format: str
    n: int | None
    k: int | None
    m: int
    kernel: str

    def __str__(self) -> str:
        return f"{self.workload} {self.layer} {self.format} m={self.m} {self.kernel}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Samples of one case under one set of conditions, by record.

    conditions: what has to agree for times to be compared, by its name. config: in words.
    code: the hash of the kernel's source. newest: time of the last record.
    """

    case: Case
    conditions: Mapping[str, str | None]
    config: str
    code: str | None
    newest: str
    samples_s: Mapping[Run, Sequence[float]]

    @property
    def medians(self) -> dict[Run, float]:
        """Median of each record, in seconds."""
        return {run: statistics.median(samples) for run, samples in self.samples_s.items()}

    @property
    def values(self) -> Sequence[float]:
        """What the median is of: a lone record's samples, or the medians of several records."""
        if len(self.samples_s) == 1:
            (samples,) = self.samples_s.values()
            return samples
        return list(self.medians.values())

    @property
    def median(self) -> Estimate:
        """In seconds."""
        return median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of `values`, over their median."""
        if len(self.values) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2 / middle

    def only(self, runs: Iterable[Run]) -> Series:
        """The part of some runs."""
        return dataclasses.replace(self, samples_s={run: self.samples_s[run] for run in runs})

    def differences(self, other: Series) -> dict[str, tuple[str | None, str | None]]:
        """Conditions that forbid a comparison, with both values."""
        names = dict.fromkeys((*self.conditions, *other.conditions))
        values = {name: (self.conditions.get(name), other.conditions.get(name)) for name in names}
        return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """All that was read from a path, after filters.

    letter: how tables call it. side: of a gate's file, else empty. series: by case, as they were
    measured. untimed: by case, how often each status but `ok` occurred, with reason and dtype.
    statuses: number of records by status. facts: what may differ and is noted, with all values.
    """

    letter: str
    path: Path
    side: str
    series: Mapping[Case, Sequence[Series]]
    untimed: Mapping[Case, Counter[tuple[str, str, str]]]
    statuses: Mapping[str, int]
    facts: Mapping[str, frozenset[str]]

    @property
    def name(self) -> str:
        """Path, and side where it has one."""
        return f"{self.path} ({self.side})" if self.side else str(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """Globs and values; empty: everything. reference: a kernel that is kept whatever `kernels`."""

    workloads: Sequence[str] = ()
    layers: Sequence[str] = ()
    formats: Sequence[str] = ()
    kernels: Sequence[str] = ()
    ms: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    reference: str | None = None

    def apply(self, frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
        """The records that pass.

        Raises VqError where a pattern or value matches none of all files, or nothing is left.
        """
        kept = list(frames)
        globs = {
            "workload": self.workloads,
            "layer": self.layers,
            "format": self.formats,
            "kernel": self.kernels,
        }
        for column, patterns in globs.items():
            names = _distinct(frames, column)
            wanted = {name for one in patterns for name in _matching(one, names, column)}
            if patterns:
                wanted |= {self.reference} if column == "kernel" and self.reference else set()
                kept = [frame[frame[column].isin(wanted)] for frame in kept]
        for column, values in (("m", self.ms), ("dtype", self.dtypes)):
            there = _distinct(frames, column)
            for value in values:
                _found([value] if value in there else [], value, there, column)
            if values:
                kept = [frame[frame[column].isin(values)] for frame in kept]
        if all(frame.empty for frame in kept):
            raise VqError("no case passes all filters together; leave one out")
        return kept


def _distinct(frames: Sequence[pd.DataFrame], column: str) -> list[Any]:
    return list(dict.fromkeys(value for frame in frames for value in frame[column]))


def _matching(pattern: str, names: Sequence[str], column: str) -> list[str]:
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return _found(found, pattern, names, column)


def _found(found: list[Any], wanted: object, there: Sequence[object], column: str) -> list[Any]:
    if not found:
        listed = ", ".join(str(value) for value in there)
        raise VqError(f"no record has {column} {wanted}; there are: {listed}")
    return found


def load_sources(paths: Sequence[Path], filters: Filters) -> list[Source]:
    """The sources that paths name, in order: one each, or two for the file of a gate.

    Raises ContainerError naming what can't be read or holds no records, VqError as the filters do.
    """
    found = [part for path in paths for part in _sides(path, _read(path))]
    if len(found) > len(_LETTERS):
        raise VqError(f"{len(found)} results, {len(_LETTERS)} at most: a folder counts as one")
    frames = filters.apply([frame for *_, frame in found])
    return [
        _source(letter, path, side, frame)
        for letter, (path, side, _), frame in zip(_LETTERS, found, frames, strict=False)
    ]


def _read(path: Path) -> pd.DataFrame:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ContainerError(f"{path}: no .jsonl in this folder; name a file, or results/<device>")
    frame = load_records(files)
    if frame.empty:
        raise ContainerError(f"{path}: holds no records; measure with `vqbench run`")
    gates = [row.get("gate") or {} for row in _rows(frame)]
    return frame.assign(
        side=[_side(gate) for gate in gates],
        # a selfcheck's calls, and a gate's confirmation, number their pairs anew
        pair=["/".join(str(gate.get(name, "")) for name in _PAIR) for gate in gates],
    )


def _side(gate: Mapping[str, Any]) -> str:
    """The side of a gate, and in a selfcheck by how much it was slowed down."""
    slow = gate.get("slow") or 0
    return f"{gate.get('side', '')}{f' slowed by {slow:.0%}' if slow else ''}"


def _sides(path: Path, frame: pd.DataFrame) -> list[tuple[Path, str, pd.DataFrame]]:
    """A gate's file is one source a side, baseline first; in a folder it's pooled like others."""
    if path.is_dir():
        return [(path, "", frame)]
    return [(path, str(side), part) for side, part in frame.groupby("side", sort=True)]


def _source(letter: str, path: Path, side: str, frame: pd.DataFrame) -> Source:
    series: dict[Case, list[Series]] = {}
    for one in _series(frame[frame["status"] == "ok"]):
        series.setdefault(one.case, []).append(one)
    untimed: dict[Case, Counter[tuple[str, str, str]]] = {}
    for row in _rows(frame[frame["status"] != "ok"]):
        ended = row["status"], row["reason"], row["dtype"]
        untimed.setdefault(_case(row), Counter())[ended] += 1
    facts: dict[str, set[str]] = {}
    for row in _rows(frame):
        for name, value in _facts(row).items():
            facts.setdefault(name, set()).add(value)
    return Source(
        letter=letter,
        path=path,
        side=side,
        series=series,
        untimed=untimed,
        statuses=Counter(frame["status"]),
        facts={name: frozenset(values) for name, values in facts.items()},
    )


def _series(frame: pd.DataFrame) -> list[Series]:
    """The series of records that were timed, in the order of their first records."""
    rows = _rows(frame)
    described = [(_case(row), _conditions(row), _config(row), row["kernel_source"]) for row in rows]
    keys = pd.DataFrame(
        {
            # one text for all that tells series apart: parts are dictionaries, or missing
            "series": [json.dumps([dataclasses.astuple(case), *rest]) for case, *rest in described],
            "run": [_run(row) for row in rows],
        }
    )
    keys["turn"] = keys.groupby(["series", "run"]).cumcount()
    found = []
    for _, group in keys.groupby("series", sort=False):
        case, conditions, config, code = described[group.index[0]]
        runs = zip(group["run"], group["turn"], strict=True)
        mine = [rows[place] for place in group.index]
        found.append(
            Series(
                case=case,
                conditions=conditions,
                config=config,
                code=code,
                newest=max(str(row.get("time", "")) for row in mine),
                samples_s=dict(zip(runs, (row["samples_s"] for row in mine), strict=True)),
            )
        )
    return found


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Records as dictionaries; what pandas filled in for missing values is None again."""
    return [
        {str(name): None if isinstance(v, float) and v != v else v for name, v in row.items()}
        for row in frame.to_dict("records")
    ]


def _case(row: Row) -> Case:
    n, k = (None if row[name] is None else int(row[name]) for name in ("n", "k"))
    texts = {name: row[name] for name in ("workload", "layer", "format", "kernel")}
    return Case(**texts, n=n, k=k, m=row["m"])


def _run(row: Row) -> str:
    """The file, run and pair that a record is of: its id is `<run>/<number>`."""
    return f"{row['path']} {str(row.get('id', '')).rpartition('/')[0]} {row['pair']}"


def _conditions(row: Row) -> dict[str, str | None]:
    """What has to agree. A format's name stands for its spec unless a build changed its meaning."""
    timing = row["timing"] or {}
    threads = timing.get("threads")
    return {
        "device": f"{row['device']} ({row['arch']})",
        "units": _text(row["units"]) if threads is None else None,  # a CPU's are its threads
        "threads": _text(threads),
        "pinned": _text(timing.get("pinned")),
        "timer": _text(timing.get("timer")),
        **{f"cache of {name}": state for name, state in (timing.get("cache") or {}).items()},
        "dtype": row["dtype"],
        "codes": row["codes"],
        "spec": json.dumps(row["spec"], sort_keys=True),
        "layers": _layers(row.get("steps") or ()),
    }


def _layers(steps: Sequence[Row]) -> str | None:
    """The layers that are one call, with their shapes; None of a single layer."""
    return ", ".join(f"{one['layer']} {one['n']}x{one['k']}" for one in steps) or None


def _config(row: Row) -> str:
    """Config in words; of several layers that are one call, each one's kernel and config."""
    if not row.get("steps"):
        return _values(row["config"])
    return "; ".join(
        " ".join(filter(None, (one["layer"], one["kernel"], _values(one["config"]))))
        for one in row["steps"]
    )


def _values(config: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def _facts(row: Row) -> dict[str, str]:
    """What may differ between sources that are compared, and is said where it does."""
    project = row.get("project") or {}
    commit = str(project.get("commit") or "")[:7]
    facts = {
        "GPU": row["uuid"],
        "driver": row["driver"],
        "power limit": _power_limit(row),
        "host": row.get("host"),
        **(row.get("versions") or {}),
        "commit": f"{commit}, changed" if commit and project.get("dirty") else commit,
        "seed": row["seed"],
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _power_limit(row: Row) -> str | None:
    before = (row.get("state") or {}).get("before")
    limit = before.get("power_limit_w") if isinstance(before, dict) else None
    return None if limit is None else f"{limit} W"


def _text(value: object) -> str | None:
    return None if value is None else str(value)
