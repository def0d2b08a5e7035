"""Out of the store: tuned tables, as `vqkernels` reads them, and attempts as rows.

A verdict in the store is a table of one entry, so that what is exported is what was concluded and
nothing has to be known of a subject's facts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import vqkernels
from autotune.measurement import Measurement
from autotune.replay import Tried, save_cache, save_results
from autotune.store import Attempt, Store, subject_key
from autotune.verdict import Judgement
from vqkernels.atomic import locked, write_atomically
from vqkernels.device import Device
from vqkernels.errors import ContainerError
from vqkernels.kernel import Registry
from vqkernels.kernel import registry as known_kernels
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tuned_table import Entry, Evidence, Pick, Table, TableDevice, load, stamp

__all__ = [
    "FORMATS",
    "attempt_rows",
    "collect",
    "conclude",
    "file_name",
    "flat_row",
    "merge",
    "searched",
    "without_origin",
    "write_spaces",
    "write_table",
]

_MADE_BY = f"vqbench {vqkernels.__version__}"

Row = dict[str, Any]


class Choice(Protocol):
    """A kernel by id, the hash of its source, and a config."""

    @property
    def kernel(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def config(self) -> Config: ...


class Result(Protocol):
    """What a tuning run ends with; `judgement` is of the winner (B) against the baseline (A)."""

    @property
    def winner(self) -> Choice: ...
    @property
    def baseline(self) -> Choice: ...
    @property
    def judgement(self) -> Judgement | None: ...


def conclude(
    store: Store,
    subject: int,
    problem: Problem,
    device: Device,
    result: Result,
    pairs: int,
    registry: Registry | None = None,
) -> Entry:
    """Record what a tuning run found for `problem`; returns the entry that an export will hold.

    The winner is chosen only where it is FASTER under the rule; else the default stays. The
    baseline must be what `dispatch.default_choice` gives: an entry held against anything else is
    never served. pairs: that the judgement rests on.
    """
    found = registry or known_kernels()
    judgement = result.judgement
    faster = judgement is not None and judgement.verdict == "FASTER"
    default = _pick(result.baseline)
    chosen = _pick(result.winner) if faster else default
    entry = Entry(
        spec=problem.spec,
        n=problem.n,
        k=problem.k,
        dtype=problem.dtype,
        m=problem.m,
        chosen=chosen,
        default=default,
        versions=stamp((found[chosen.kernel], found[default.kernel]), device),
        evidence=Evidence(
            ratio=1.0 if judgement is None else 1 / judgement.ratio,
            low=1.0 if judgement is None else 1 / judgement.high,
            pairs=0 if judgement is None else pairs,
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            store=store.url,
            subject=subject_key(store.subjects()[subject]),
        ),
    )
    store.conclude(subject, Table(TableDevice.of(device), (entry,)).to_dict(_MADE_BY))
    return entry


def _pick(choice: Choice) -> Pick:
    return Pick(choice.kernel, choice.source, choice.config)


def collect(store: Store) -> list[Table]:
    """A table for each device that has verdicts, with the newest entry of each problem."""
    tables: dict[TableDevice, Table] = {}
    for verdict in store.verdicts():
        try:
            table = Table.from_dict(verdict)
        except ContainerError as error:
            raise ContainerError(f"store {store.url}: a verdict {error}; tune again") from error
        known = tables.get(table.device)
        tables[table.device] = merge(known.entries if known else (), table)
    return list(tables.values())


def merge(old: Iterable[Entry], table: Table) -> Table:
    """`table` with those of `old` that it has nothing newer for, always in the same order."""
    newest: dict[object, Entry] = {}
    for entry in (*old, *table.entries):
        key = (*entry.key, entry.m)
        if key not in newest or _made(newest[key]) <= _made(entry):
            newest[key] = entry
    return dataclasses.replace(table, entries=tuple(sorted(newest.values(), key=_order)))


def _made(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry.evidence.made)


def _order(entry: Entry) -> tuple[Any, ...]:
    spec = json.dumps(entry.spec.to_dict(), sort_keys=True)
    return spec, entry.n, entry.k, entry.dtype, entry.m


def without_origin(table: Table) -> Table:
    """The entries without the store's place: one's own disk says nothing to others."""
    entries = (
        dataclasses.replace(entry, evidence=dataclasses.replace(entry.evidence, store=""))
        for entry in table.entries
    )
    return dataclasses.replace(table, entries=tuple(entries))


def file_name(device: TableDevice) -> str:
    """What a device's table is called in a folder of tables."""
    return f"{device.slug}.json"


def write_table(table: Table, path: Path) -> Table:
    """Write `table` to `path`, over the older entries of a table that is there; returns the whole.

    Two processes that export to one file lose nothing. Raises ContainerError where something else
    is there, or it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ContainerError(f"{path}: {error.strerror}; choose another folder") from error
    with locked(path):
        return _merged_into(path, table)


def _merged_into(path: Path, table: Table) -> Table:
    if path.exists():
        try:
            old = load(path)
        except ContainerError as error:
            raise ContainerError(f"{path}: {error}; move it away first") from error
        if old.device != table.device:
            raise ContainerError(f"{path}: is for {old.device}; name another file")
        table = merge(old.entries, table)
    fields = table.to_dict(_MADE_BY)
    # sorted, so that two tables can be compared as text
    text = json.dumps(fields, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(path, [text.encode() + b"\n"])
    return table


# ------------------------------------------------------------------------------------------------
# attempts


def attempt_rows(store: Store) -> Iterator[Row]:
    """A row for each finished attempt, with all its samples."""
    for subject, facts in store.subjects().items():
        for attempt in store.attempts(subject):
            yield {
                "subject": subject_key(facts),
                "facts": facts,
                "kernel": attempt.key.kernel,
                "source": attempt.key.source,
                "config": dict(attempt.key.config),
                "round": attempt.key.round,
                "measurement": attempt.measurement.to_dict(),
                "log": attempt.log,
                "finished": attempt.finished,
            }


def searched(store: Store, subject: int, registry: Registry | None = None) -> list[Attempt]:
    """The attempts of the search on a subject, in the order in which they were begun.

    Of each kernel's last source alone, whose space is what it is now.
    """
    kernels = (registry or known_kernels()).kernels
    sources = {name: kernel.source_hash for name, kernel in kernels.items()}
    return [
        one
        for one in store.attempts(subject)
        if one.key.round == 0 and sources.get(one.key.kernel) == one.key.source
    ]


def flat_row(row: Row) -> Row:
    """A row of `attempt_rows` for a spreadsheet: columns `a.b` for fields of fields, lists as JSON.

    Of the samples, their number, median and spread.
    """
    measured = dict(row["measurement"])
    samples = measured.pop("samples_s")
    figures = Measurement.from_dict(row["measurement"])
    counted = {
        "samples": len(samples),
        "median_s": figures.median_s if samples else None,
        "spread": figures.spread if samples else None,
    }
    plain = {name: value for name, value in row.items() if name != "measurement"}
    return dict(_flat("", {**plain, **measured, **counted}))


def _flat(prefix: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------
# other tools' formats

FORMATS = ("kernel-tuner", "t4")


def write_spaces(
    store: Store, folder: Path, form: str, registry: Registry | None = None
) -> list[Path]:
    """Write the search of each subject and kernel as a file that other tools replay.

    form: of `FORMATS`. Raises ContainerError where a file can't be written.
    """
    found, paths = registry or known_kernels(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ContainerError(f"{folder}: {error.strerror}; choose another folder") from error
    for subject, facts in store.subjects().items():
        tried: dict[str, list[Tried]] = {}
        for one in searched(store, subject, found):
            tried.setdefault(one.key.kernel, []).append(
                Tried(one.key.config, one.measurement, one.finished)
            )
        for kernel_id, attempts in tried.items():
            path = folder / f"{kernel_id.replace('/', '-')}-{subject_key(facts)[:12]}.json"
            if form == "t4":
                save_results(path, attempts)
            else:
                save_cache(
                    path,
                    found[kernel_id].space,
                    attempts,
                    kernel=kernel_id,
                    device=str(facts["device"]["name"]),
                    problem=[facts["m"], facts["n"], facts["k"]],
                )
            paths.append(path)
    return paths
