"""Records: one JSON object a line, one file a run, under `results/<device>/`.

A line is written whole and flushed before the next case starts, so an interrupted run keeps what
it measured. What a killed one left unfinished has no newline: readers pass over it. `load_records`
gives pandas a flat table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType, UnionType
from typing import Any

import pandas as pd

from autotune.measurement import Measurement
from vqkernels.errors import ContainerError

__all__ = ["SCHEMA_VERSION", "Case", "RecordFile", "load_records", "measurement_of", "read_records"]

SCHEMA_VERSION = 1

# What readers take a field to be; a record may lack those that aren't of a `Case`.
_TYPES: dict[str, type | UnionType] = {
    **dict.fromkeys(("workload", "layer", "format", "dtype", "kernel"), str),
    **dict.fromkeys(("n", "k"), int | None),
    **dict.fromkeys(("m", "stands_for"), int),
    "steps": list,
    **dict.fromkeys(("spec", "config", "device", "versions", "project", "state", "gate"), dict),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What was measured: everything of a record but the measurement and the machine.

    Several layers timed as one call have neither n nor k; `steps` names each with its shape,
    kernel and config. stands_for: so many layers of the workload are of this one's kind.
    """

    workload: str
    layer: str
    format: str
    spec: Mapping[str, Any]
    n: int | None
    k: int | None
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
    steps: Sequence[Mapping[str, Any]] = ()
    stands_for: int = 1


class RecordFile:
    """A results file being written: `run.write(case, measurement)` adds a line.

    header: fields that every record carries (argv, host, device, versions). kind: what the file's
    name ends in: the command. records: what the file holds, also after an interrupt. `reopen` goes
    on with a file that is there.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], kind: str = "run") -> None:
        stamp = datetime.now().astimezone()
        self._kind = kind
        self.path = folder / f"{stamp:%Y%m%dT%H%M%S}-{kind}.jsonl"
        self._header = {"schema": SCHEMA_VERSION, **header}
        self.records: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._create(folder, stamp)
        except OSError as error:
            raise ContainerError(
                f"{folder}: results can't be written: {error.strerror}; "
                f"choose another folder with --results"
            ) from error

    @classmethod
    def reopen(cls, path: Path, header: Mapping[str, Any]) -> RecordFile:
        """Go on with the file at `path`; an unfinished line at its end is cut off.

        Raises ContainerError where it can't be read or written.
        """
        file = cls.__new__(cls)
        file.path, file._header = path, {"schema": SCHEMA_VERSION, **header}
        file.records = read_records(path)
        try:
            file._file = FileIO(path, "r+")
            whole = path.read_bytes().rfind(b"\n") + 1
            file._file.truncate(whole)
            file._file.seek(whole)
        except OSError as error:
            raise ContainerError(f"{path}: can't be written: {error.strerror}") from error
        return file

    def _create(self, folder: Path, stamp: datetime) -> FileIO:
        number = 1
        while True:
            try:
                # unbuffered: what could not be written must not be tried again on closing
                return FileIO(self.path, "x")
            except FileExistsError:  # a run that started in the same second
                number += 1
                self.path = folder / f"{stamp:%Y%m%dT%H%M%S}-{self._kind}-{number}.jsonl"

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if not self.records:
            self.path.unlink()

    def write(
        self,
        case: Case,
        measurement: Measurement,
        state: Mapping[str, Any],
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Append one record and return it. `state`: of the device, before and after.

        more: fields of this record alone, or in place of the header's. Ctrl-C waits until the line
        is whole and counted.
        """
        with _uninterrupted():
            return self._append(case, measurement, state, more)

    def _append(
        self,
        case: Case,
        measurement: Measurement,
        state: Mapping[str, Any],
        more: Mapping[str, Any],
    ) -> dict[str, Any]:
        number = len(self.records) + 1
        record = {
            **self._header,
            "id": f"{self.path.stem}/{number}",
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            **dataclasses.asdict(case),
            "state": dict(state),
            **measurement.to_dict(),
            **more,
        }
        line = json.dumps(record, default=_plain, allow_nan=False) + "\n"
        start = self._file.tell()
        try:
            rest = line.encode()
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)  # no half line for readers to stumble over
            raise ContainerError(
                f"{self.path}: record {number} can't be written: {error.strerror}; "
                f"the records before it are kept; free space or use --results"
            ) from error
        self.records.append(record)
        return record


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C within takes effect at the end: between a write and its bookkeeping, records are lost.

    Python delivers signals to the main thread alone; elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        signal.raise_signal(signal.SIGINT)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a record holds {value!r}, which JSON doesn't know")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one file, as dictionaries.

    Raises ContainerError naming the line that isn't a record of this schema.
    """
    try:
        *lines, unfinished = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ContainerError(f"{path}: can't be read: {error}; give a results file") from error
    if unfinished and not lines:
        raise ContainerError(f"{path}: holds no record; give a results file")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            version = record["schema"]
            if version == SCHEMA_VERSION:
                _check(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ContainerError(f"{path}: line {number} is no record; remove it") from error
        if version != SCHEMA_VERSION:
            raise ContainerError(
                f"{path}: line {number} has schema {version}, this build reads {SCHEMA_VERSION}"
            )
        records.append(record)
    return records


def _check(record: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError where something that readers need is missing."""
    measured = measurement_of(record)
    # a sample may be 0 where the clock is coarse; a median of 0 is no measurement
    if not all(0 <= sample < math.inf for sample in measured.samples_s):
        raise ValueError("samples are seconds")
    if measured.samples_s and not measured.median_s:
        raise ValueError("a median of 0")
    if measured.timing:
        dict(measured.timing.cache)
    for field in dataclasses.fields(Case):
        if field.default is dataclasses.MISSING:  # what has a default came with a later build
            record[field.name]
    for name, kind in _TYPES.items():
        if name in record and not isinstance(record[name], kind):
            raise TypeError(f"{name} is no {kind}")
    for step in record.get("steps", ()):
        dict(step["config"])
    record["device"]["name"]


def measurement_of(record: Mapping[str, Any]) -> Measurement:
    """The measurement in a record, whose fields stand beside those of the case."""
    names = Measurement.__dataclass_fields__
    return Measurement.from_dict({name: v for name, v in record.items() if name in names})


def load_records(paths: Iterable[Path]) -> pd.DataFrame:
    """All records of some files as one table: a row a record, medians and spreads derived.

    device, arch, units, uuid and driver are the device's; path is the record's file.
    """
    rows = []
    for path in paths:
        for record in read_records(path):
            measured = measurement_of(record)
            timed = measured.status == "ok"
            device = record["device"]
            row = {**record, "device": device["name"], "path": str(path)}
            row |= {name: device.get(name) for name in ("arch", "units", "uuid", "driver")}
            row["median_s"] = measured.median_s if timed else math.nan
            row["spread"] = measured.spread if timed else math.nan
            rows.append(row)
    return pd.DataFrame(rows)
