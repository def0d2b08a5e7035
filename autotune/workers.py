"""Workers: processes that run tasks and may be killed, so that no task ends the run.

A kernel may hang, end its process, or leave a GPU's context unusable. Each is that task's outcome,
with the reason; the worker is replaced and the rest goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from types import TracebackType
from typing import Any, Literal

__all__ = ["Outcome", "Pool", "Task", "step"]

Status = Literal["done", "raised", "died", "timeout", "unstarted"]

# A fresh process has this long besides, to start and to import.
START_S = 90.0

# What the server of fresh processes imports once.
PRELOAD = "autotune.preload"

# Of what a process that died wrote to its standard streams.
_LOG_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Task:
    """A call of `function`, by name importable in another process, with picklable arguments.

    limit_s: where it isn't the pool's; of the time until the first `step`, if it names any.
    limits: of each step by name, where it isn't the same.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    limit_s: float | None = None
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended: its value where `status` is done, else a reason of one line.

    status: `raised` (an exception), `died` (its process ended), `timeout`, or `unstarted` (the
    pool's time was over). step: what it was at. steps_s: seconds of each step that ended. log: the
    end of what the process wrote, where it didn't live to say why.
    """

    task: Task
    status: Status
    value: Any = None
    reason: str = ""
    step: str = ""
    log: str = ""
    steps_s: Mapping[str, float] = dataclasses.field(default_factory=dict)


def step(name: str) -> None:
    """Say, from within a task, what it goes on to; that has a time limit of its own."""
    if _parent is not None:
        _parent.send(("step", (name, time.monotonic()), True))


_parent: Connection | None = None  # of a worker


@functools.cache
def _processes() -> ForkServerContext:
    """Where fresh processes come from: a server that has imported what tasks need, and run nothing.

    A fork of it has memory, compiled code and threads of its own within 30 ms, where a new
    interpreter imports torch for two seconds. The server never touches a GPU: a forked CUDA
    context is unusable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # the server takes no sys.path: it would import what is installed where a source tree runs
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Pool:
    """`jobs` processes for tasks that each may take `limit_s`; `with` ends them all."""

    def __init__(self, jobs: int, limit_s: float) -> None:
        self._jobs, self._limit_s = jobs, limit_s
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._workers:
            self._workers.pop().kill()

    def run(self, tasks: Iterable[Task], until: float | None = None) -> Iterator[Outcome]:
        """Outcomes as tasks end. A task is drawn when a worker is free, so it may depend on them.

        until: on `time.monotonic`, when no more tasks are started.
        """
        waiting = iter(tasks)
        more = True
        while more or self._busy():
            while more and self.free:
                task = next(waiting, None)
                if task is None:
                    more = False
                elif until is not None and time.monotonic() >= until:
                    yield Outcome(task, "unstarted", reason="the time for the run was over")
                else:
                    self.start(task)
            yield from self.ended()

    @property
    def free(self) -> bool:
        """Whether another task can be started."""
        return len(self._busy()) < self._jobs

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.task is not None]

    def start(self, task: Task) -> None:
        """Begin a task beside others, where `free`; `ended` tells of its end."""
        free = next((worker for worker in self._workers if worker.task is None), None)
        if free is None:
            free = _Worker()
            self._workers.append(free)
        free.start(task, task.limit_s or self._limit_s)

    def ended(self, patience_s: float = math.inf) -> list[Outcome]:
        """What has ended by the time that something has, a limit is reached, or patience ends."""
        busy = self._busy()
        if not busy:
            return []
        soonest = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.pipe for worker in busy], max(0.0, min(soonest, patience_s)))
        outcomes = []
        for worker in busy:
            outcome = worker.outcome()
            if outcome is not None:
                outcomes.append(outcome)
            if not worker.usable:
                worker.kill()
                self._workers.remove(worker)
        return outcomes


class _Worker:
    """One process and what it is at."""

    def __init__(self) -> None:
        context = _processes()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self.pipe, theirs = context.Pipe()
        log = f"/proc/{os.getpid()}/fd/{self._log.fileno()}"
        self._process = context.Process(
            target=_serve, args=(theirs, log, dict(os.environ)), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the pipe ends with the process
        self._grace_s = START_S
        self.task: Task | None = None
        self.deadline = 0.0
        self.usable = True

    def start(self, task: Task, limit_s: float) -> None:
        self.task = task
        self.deadline = time.monotonic() + limit_s + self._grace_s
        self._limit_s, self._grace_s = limit_s, 0.0
        self._step, self._since = "", 0.0
        self._steps_s: dict[str, float] = {}
        self._log.truncate(0)
        with contextlib.suppress(OSError):  # a process that has ended: `outcome` says so
            self.pipe.send(task)

    def outcome(self) -> Outcome | None:
        """The task's outcome, once there is one."""
        task = self.task
        assert task is not None
        while self.pipe.poll():
            try:
                status, value, self.usable = self.pipe.recv()
            except (EOFError, OSError):
                self.usable = False
                return self._end("died", reason=self._why())
            if status == "step":
                name, since = value
                self._close_step(since)
                self._step, self._since = name, since
                self._limit_s = task.limits.get(name, self._limit_s)
                self.deadline = time.monotonic() + self._limit_s
            elif status == "done":
                return self._end("done", value=value)
            else:
                return self._end("raised", reason=value)
        if time.monotonic() < self.deadline:
            return None
        self.usable = False
        at = f"{self._step}: " if self._step else ""
        return self._end("timeout", reason=f"{at}not done after {self._limit_s:g} s")

    def _close_step(self, now: float) -> None:
        if self._step:
            before = self._steps_s.get(self._step, 0.0)
            self._steps_s[self._step] = before + now - self._since

    def _end(self, status: Status, value: Any = None, reason: str = "") -> Outcome:
        task, self.task = self.task, None
        assert task is not None
        self._close_step(time.monotonic())
        log = self._tail() if status in ("died", "timeout") else ""
        return Outcome(task, status, value, reason, self._step, log, self._steps_s)

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_BYTES))
        return self._log.read().decode(errors="replace").replace("\0", "").strip()

    def _why(self) -> str:
        """How the process ended, in words."""
        self._process.join(10)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"the process was ended by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"

    def kill(self) -> None:
        """End the process and what it started."""
        self.pipe.close()
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)
        self._log.close()


def _serve(pipe: Connection, log: str, environment: Mapping[str, str]) -> None:
    """A worker's life: a task, its outcome, until the pipe ends or the GPU's context is lost."""
    global _parent
    _parent = pipe
    os.environ.clear()  # the server's is that of the time when it began
    os.environ.update(environment)
    # else the lock that numba makes has a name, and is reported as leaked when the worker is killed
    multiprocessing.set_start_method("fork", force=True)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # a group of its own, so that compilers end with it
    _write_to(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    usable = True
    while usable:
        try:
            task = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # what can't be imported here
            pipe.send(("raised", _line(error), True))
            continue
        try:
            message = ("done", task.function(*task.arguments))
        except Exception as error:  # a task may fail in any way; the reason is its outcome
            message = ("raised", _line(error))
        usable = _gpu_answers()
        try:
            pipe.send((*message, usable))
        except Exception as error:  # a value that can't be pickled
            pipe.send(("raised", _line(error), usable))


def _write_to(log: str) -> None:
    """Standard streams into the parent's file, at its end: what a crash says there is its log."""
    with contextlib.suppress(OSError):
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
    faulthandler.enable()


def _gpu_answers() -> bool:
    """False after an error that every later CUDA call would report again."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:  # AcceleratorError or RuntimeError, by the version of torch
        return False
    return True


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
