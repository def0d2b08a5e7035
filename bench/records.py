"""Records: one JSON object a line, one file a run, under `results/<device>/`.

A line is written whole and flushed before the next case starts, so an interrupted run keeps what
it measured. `load_records` gives pandas a flat table.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import pandas as pd

from autotune.measurement import Measurement
from vqkernels.errors import ContainerError

__all__ = ["SCHEMA_VERSION", "Case", "RecordFile", "load_records", "read_records"]

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What was measured: everything of a record but the measurement and the machine."""

    workload: str
    layer: str
    format: str
    spec: Mapping[str, Any]
    n: int
    k: int
    m: int
    dtype: str
    kernel: str
    kernel_source: str | None
    config: Mapping[str, Any]
    config_from: str
    seed: int
    codes: str | None
    relative_error: float | None
    effective_bits: float | None


class RecordFile:
    """A results file being written: `run.write(case, measurement)` adds a line.

    header: fields that every record carries (argv, host, device, versions).
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        stamp = datetime.now().astimezone()
        self.path = folder / f"{stamp:%Y%m%dT%H%M%S}-run.jsonl"
        self._header = {"schema": SCHEMA_VERSION, **header}
        self._count = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = 1
            while self.path.exists():
                number += 1
                self.path = folder / f"{stamp:%Y%m%dT%H%M%S}-run-{number}.jsonl"
            self._file: TextIO = self.path.open("x", encoding="utf-8")
        except OSError as error:
            raise ContainerError(
                f"{folder}: results can't be written: {error.strerror}; "
                f"choose another folder with --results"
            ) from error

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._count == 0:
            self.path.unlink()

    def write(
        self, case: Case, measurement: Measurement, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Append one record and return it. `state`: of the device, before and after."""
        self._count += 1
        record = {
            **self._header,
            "id": f"{self.path.stem}/{self._count}",
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            **dataclasses.asdict(case),
            "state": dict(state),
            **measurement.to_dict(),
        }
        try:
            self._file.write(json.dumps(record, default=_plain, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ContainerError(
                f"{self.path}: record {self._count} can't be written: {error.strerror}; "
                f"the records before it are kept; free space or use --results"
            ) from error
        return record


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a record holds {value!r}, which JSON doesn't know")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one file, as dictionaries.

    Raises ContainerError naming the line that isn't a record of this schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ContainerError(f"{path}: can't be read: {error}; give a results file") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            version = record["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise ContainerError(f"{path}: line {number} is no record; remove it") from error
        if version != SCHEMA_VERSION:
            raise ContainerError(
                f"{path}: line {number} has schema {version}, this build reads {SCHEMA_VERSION}"
            )
        records.append(record)
    return records


def load_records(paths: Iterable[Path]) -> pd.DataFrame:
    """All records of some files as one table: a row a record, medians and spreads derived."""
    rows = []
    for path in paths:
        for record in read_records(path):
            names = {field.name for field in dataclasses.fields(Measurement)}
            measured = Measurement.from_dict({n: v for n, v in record.items() if n in names})
            timed = measured.status == "ok"
            row = {**record, "device": record["device"]["name"]}
            row["median_s"] = measured.median_s if timed else math.nan
            row["spread"] = measured.spread if timed else math.nan
            rows.append(row)
    return pd.DataFrame(rows)
