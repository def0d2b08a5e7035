"""Fresh processes that measure: an interpreter of its own for each, started and waited for.

Never a fork of a server: all its forks share one layout of memory, which alone can make code some
percent slower on one side (T. Mytkowicz and others, "Producing wrong data without doing anything
obviously wrong!", 2009).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.measurement import Measurement
from bench.gate.job import Job
from bench.gate.sides import Side
from vqkernels.errors import BackendError

__all__ = ["Measured", "Process", "measure"]

# To start, import and compile (20 s for a Triton kernel of many stages), and to check and time.
START_S = 120.0
CASE_S = 240.0

_LOG_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Measured:
    """One case in one process. facts: code, source, config and spec, where it came so far."""

    case: str
    measurement: Measurement
    state: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Process:
    """What a side's process measured, and where: its device and the versions it found."""

    device: Mapping[str, Any]
    versions: Mapping[str, str]
    measured: tuple[Measured, ...]


def measure(side: Side, job: Job, harness: str) -> Process:
    """Measure the job's cases in a fresh process of `side`.

    A case that ends the process costs itself alone: a further process takes those behind it.
    Raises BackendError where a process can't start, or finds other code than the side's.
    """
    left, done, head = list(job.targets), list[Measured](), dict[str, Any]()
    while left:
        part = dataclasses.replace(job, targets=tuple(left), configs=side.configs, slow=side.slow)
        lines, reason = _run(side, part, harness)
        head = _head(side, lines, reason)
        found = [_measured(line) for line in lines if "case" in line]
        done += found
        left = left[len(found) :]
        if left:  # it ended within this one
            status = "timeout" if reason.startswith("not done") else "runtime"
            lost = Measurement(status=status, reason=reason)  # type: ignore[arg-type]
            done.append(Measured(left.pop(0).name, lost, {}, {}))
    return Process(head.get("device", {}), head.get("versions", {}), tuple(done))


def _measured(line: Mapping[str, Any]) -> Measured:
    facts = {key: line[key] for key in ("code", "source", "config", "spec") if key in line}
    measurement = Measurement.from_dict(line["measurement"])
    return Measured(line["case"], measurement, line["state"], facts)


def _head(side: Side, lines: Sequence[Mapping[str, Any]], reason: str) -> dict[str, Any]:
    """What measured; nothing may be compared that isn't the side's own code."""
    if not lines:
        raise BackendError(f"{side.what}: its process can't measure: {reason}")
    head = dict(lines[0])
    if side.root is not None and Path(head["vqkernels"]) != Path(side.root) / "vqkernels":
        raise BackendError(
            f"{side.what}: its process found vqkernels in {head['vqkernels']}, not in {side.root}"
        )
    return head


def _run(side: Side, job: Job, harness: str) -> tuple[list[dict[str, Any]], str]:
    """The lines that a process wrote, and how it ended where that was not as it should."""
    folder = Path(job.folder)
    number = uuid.uuid4().hex
    job_file, out = folder / f"{number}.job.json", folder / f"{number}.out.jsonl"
    job_file.write_text(job.to_json(), encoding="utf-8")
    command = [side.python, "-P", "-m", "bench.gate.measure", str(job_file), str(out)]
    limit_s = START_S + CASE_S * len(job.targets)
    with tempfile.TemporaryFile() as log:
        with _started(command, folder, _environment(side, harness), log) as process:
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
        lines = _lines(out)
        at = next((line["begin"] for line in reversed(lines) if "begin" in line), None)
        reason = _why(code, limit_s, _tail(log))
    for path in (job_file, out):
        path.unlink(missing_ok=True)
    if at is None and len(lines) > 1:
        raise BackendError(f"{side.what}: its process ended early: {reason}")
    return lines, reason


@contextlib.contextmanager
def _started(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with all that it started."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        raise BackendError(f"{command[0]}: can't be started: {error.strerror}") from error
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(side: Side, harness: str) -> dict[str, str]:
    """This process's, but for where modules are found. Kernels run in the configs that are asked
    for, not in those of a developer's tuned tables.
    """
    path = os.pathsep.join([harness, *side.path])
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "VQBENCH_TUNED": "off"}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines: the last may have been cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _tail(log: Any) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _LOG_BYTES))
    lines = str(log.read().decode(errors="replace")).strip().splitlines()
    return lines[-1] if lines else ""


def _why(code: int | None, limit_s: float, said: str) -> str:
    if code is None:
        return f"not done after {limit_s:g} s"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}" + (f": {said}" if said else "")
