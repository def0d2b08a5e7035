"""Fresh processes that measure, one a side, in turns.

A process has an interpreter of its own, never a fork of a server: all forks of one share one layout
of memory, which alone can make code some percent slower on one side (T. Mytkowicz and others,
"Producing wrong data without doing anything obviously wrong!", 2009).

The two of a pair begin a case together, and take its samples in slices by turns, so that what a
shared machine does meanwhile falls on both. Nothing else runs while one of them takes samples: who
has compiled and checked waits for the other, and so does who has all of its samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.measurement import Measurement
from bench.gate.job import BEGIN, TURN, Job
from bench.gate.sides import Side, Who
from vqkernels.errors import BackendError

__all__ = ["Measured", "Process", "SideError", "measure"]

# To start and import; and for each step of a case (a Triton kernel of many stages compiles for
# 20 s, a large layer on a slow kernel is checked for a minute).
START_S = 120.0
STEP_S = 240.0

_LOG_BYTES = 4096


class SideError(BackendError):
    """A side whose processes can't measure at all."""

    def __init__(self, who: Who, reason: str) -> None:
        super().__init__(reason)
        self.who = who


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


def measure(sides: Mapping[Who, Side], job: Job, harness: str) -> dict[Who, Process]:
    """Measure the job's cases in a fresh process of each side; the first has the first turn.

    A case that ends a process costs itself alone: a further process takes those behind it.
    Raises SideError where a process can't start, or finds other code than the side's.
    """
    runners = {who: _Runner(who, side, job, harness) for who, side in sides.items()}
    try:
        for runner in runners.values():
            runner.start()
        for _ in job.targets:
            _case(list(runners.values()))
        return {who: runner.finish() for who, runner in runners.items()}
    finally:
        for runner in runners.values():
            runner.kill()


def _case(runners: Sequence[_Runner]) -> None:
    """One case on all sides."""
    _all_go(runners)
    while True:
        wanting = [one for one in runners if one.wants == TURN]
        for one in wanting:
            one.go()
            one.hear()
        if wanting:
            continue
        waiting = [one for one in runners if one.in_case]
        if not waiting:
            return
        _all_go(waiting)


def _all_go(runners: Sequence[_Runner]) -> None:
    """Let all go on at once, until each wants something."""
    for one in runners:
        one.go()
    for one in runners:
        one.hear()


class _Runner:
    """One side's process, and the next one where it dies. wants: what it asks for; None: ended."""

    def __init__(self, who: Who, side: Side, job: Job, harness: str) -> None:
        self._who, self._side = who, side
        self._job = dataclasses.replace(job, configs=side.configs, slow=side.slow)
        self._harness = harness
        self._left = list(job.targets)
        self._done: list[Measured] = []
        self._head: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.wants: bytes | None = None

    @property
    def in_case(self) -> bool:
        """Whether it is within a case."""
        return self.wants not in (None, BEGIN)

    def start(self) -> None:
        """Start a process for the cases that are left."""
        folder, number = Path(self._job.folder), uuid.uuid4().hex
        self._file, self._out = folder / f"{number}.job.json", folder / f"{number}.out.jsonl"
        job = dataclasses.replace(self._job, targets=tuple(self._left))
        self._file.write_text(job.to_json(), encoding="utf-8")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._ask, ask = os.pipe()
        answer, self._answer = os.pipe()
        words = [str(self._file), str(self._out), str(ask), str(answer)]
        try:
            self._process = subprocess.Popen(
                [self._side.python, "-P", "-m", "bench.gate.measure", *words],
                cwd=folder,
                env=_environment(self._side, self._harness),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(ask, answer),
                start_new_session=True,
            )
        except OSError as error:
            self._close()
            reason = f"{self._side.python}: can't be started: {error.strerror}"
            raise SideError(self._who, reason) from error
        finally:
            os.close(ask)
            os.close(answer)
        self._limit_s, self.wants = START_S, b""

    def go(self) -> None:
        """Grant what it asks for; a process for the next case, where the last one died."""
        if self._process is None:
            self.start()
        if self.wants == b"":
            self.hear()  # it has started
        with contextlib.suppress(OSError):  # it has ended: `hear` tells
            os.write(self._answer, b"g")
        self._limit_s = STEP_S

    def hear(self) -> None:
        """Wait until it asks for something; what ends it instead ends its case."""
        ready, _, _ = select.select([self._ask], [], [], self._limit_s)
        self.wants = (os.read(self._ask, 1) if ready else b"") or None
        if self.wants is None:
            self._ended(None if not ready else self._code())

    def finish(self) -> Process:
        """What was measured in all."""
        return Process(
            self._head.get("device", {}), self._head.get("versions", {}), tuple(self._done)
        )

    def kill(self) -> None:
        """End the process with all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._close()

    def _close(self) -> None:
        self._log.close()
        os.close(self._ask)
        os.close(self._answer)
        self._file.unlink(missing_ok=True)

    def _code(self) -> int:
        """The exit code of a process that has closed its pipe."""
        assert self._process is not None, "it was started"
        try:
            return self._process.wait(STEP_S)
        except subprocess.TimeoutExpired:
            return 0  # it hangs behind its last case, whose result is there

    def _ended(self, code: int | None) -> None:
        """Read what it left. code: None where it hangs."""
        reason = _why(code, self._limit_s, _tail(self._log))
        self.kill()
        lines = _lines(self._out)
        self._head = _head(self._who, self._side, lines, reason)
        found = [_measured(line) for line in lines if "case" in line]
        self._done += found
        self._left = self._left[len(found) :]
        if sum("begin" in line for line in lines) > len(found):
            status = "timeout" if code is None else "runtime"
            lost = Measurement(status=status, reason=reason)  # type: ignore[arg-type]
            self._done.append(Measured(self._left.pop(0).name, lost, {}, {}))
        elif self._left:
            raise SideError(self._who, f"{self._side.what}: its process ended early: {reason}")


def _head(who: Who, side: Side, lines: Sequence[Mapping[str, Any]], reason: str) -> dict[str, Any]:
    """What measured; nothing may be compared that isn't the side's own code."""
    if not lines:
        raise SideError(who, f"{side.what}: its process can't measure: {reason}")
    head = dict(lines[0])
    if side.root is not None and Path(head["vqkernels"]) != Path(side.root) / "vqkernels":
        found = head["vqkernels"]
        raise SideError(
            who, f"{side.what}: its process found vqkernels in {found}, not in {side.root}"
        )
    return head


def _measured(line: Mapping[str, Any]) -> Measured:
    facts = {key: line[key] for key in ("code", "source", "config", "spec") if key in line}
    measurement = Measurement.from_dict(line["measurement"])
    return Measured(line["case"], measurement, line["state"], facts)


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
