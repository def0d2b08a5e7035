"""A trial: one attempt at a config in a process that may be killed, from what names it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune import workers
from autotune.ahead import Ahead, Cores, divide
from autotune.bandwidth import Bandwidth
from autotune.evaluate import evaluate
from autotune.measurement import Measurement, Status
from autotune.subject import Subject, make_subject
from autotune.timers import Budget, set_threads
from autotune.workers import Outcome, Pool, Task
from vqkernels.device import Device, detect, detect_cpu
from vqkernels.kernel import find_kernel
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor

__all__ = ["LIMITS", "Processes", "Recipe"]

# Seconds of each step. A numba kernel compiles in 1 to 3 s, a Triton kernel of 4 stages in 20.
LIMITS = {"subject": 300.0, "compile": 120.0, "check": 60.0, "time": 60.0}

# Of the machine's memory, what a trial on a CPU may take beyond what its process began with.
_MEMORY_SHARE = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is tuned: a product and where, as plain values that another process can take.

    device: as torch names it. threads: of a CPU. seed: of the weight and the tokens.
    """

    spec: CodebookSpec
    n: int
    k: int
    m: int
    dtype: Dtype = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    cold: bool = True

    @property
    def problem(self) -> Problem:
        """The product."""
        return Problem(m=self.m, n=self.n, k=self.k, spec=self.spec, dtype=self.dtype)

    def where(self) -> Device:
        """The device, as this process sees it."""
        return detect_cpu(self.threads) if self.device == "cpu" else detect(self.device)

    def facts(self, device: Device) -> dict[str, Any]:
        """What names it in a store: the recipe, and the device by what doesn't change."""
        fields = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        kept = ("kind", "name", "arch", "units", "uuid")
        return fields | {"device": {name: getattr(device, name) for name in kept}}


class Processes:
    """Evaluates in a worker process of its own, which is replaced when a config ends it.

    spent_s: seconds of each step (subject, compile, check, time) of all attempts so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        budget: Budget | None = None,
        bandwidth: Bandwidth | None = None,
        limits: Mapping[str, float] = LIMITS,
    ) -> None:
        self._recipe, self._budget, self._bandwidth = recipe, budget or Budget(), bandwidth
        self._limits = limits
        self.spent_s: dict[str, float] = collections.defaultdict(float)
        where = recipe.where()
        self._cores = divide(where)
        self._ahead = Ahead(recipe.problem, where, self._cores.compiling, limits["compile"])
        self._folder = tempfile.TemporaryDirectory(prefix="vqbench-")
        self._pool = self._open()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__(None, None, None)
        self._ahead.__exit__(None, None, None)
        self._folder.cleanup()

    def fresh(self) -> None:
        """Go on in a process that has run nothing yet."""
        self._pool.__exit__(None, None, None)
        self._pool = self._open()

    def coming(self, choices: Sequence[tuple[str, Config]]) -> None:
        """What will be measured next: it compiles while something else is timed."""
        self._ahead.tell(choices)

    def measure(
        self, kernel: str, config: Config, give_up_s: float | None = None
    ) -> tuple[Measurement, str]:
        """One attempt, and what its process left behind if it died over it."""
        begun = time.monotonic()
        compiled = self._ahead.outcome(kernel, config)
        self.spent_s["compile"] += time.monotonic() - begun
        if compiled is not None and compiled.status != "done":
            return Measurement(status=_failed(compiled), reason=compiled.reason), compiled.log
        budget = dataclasses.replace(self._budget, give_up_s=give_up_s)
        plan = _Attempt(
            recipe=self._recipe,
            kernel=kernel,
            config=config,
            budget=budget,
            bandwidth=self._bandwidth,
            kept=Path(self._folder.name) / "answers.safetensors",
            cores=self._cores,
        )
        task = Task(_attempt, (plan,), self._limits["subject"], self._limits)
        (outcome,) = self._pool.run([task])
        for step, seconds in outcome.steps_s.items():
            self.spent_s[step] += seconds
        return _measurement(outcome), outcome.log

    def _open(self) -> Pool:
        return Pool(1, self._limits["subject"])


def _measurement(outcome: Outcome) -> Measurement:
    """What a task's end says of the config that it was at."""
    if outcome.status == "done":
        found: Measurement = outcome.value
        return found
    return Measurement(status=_failed(outcome), reason=outcome.reason)


def _failed(outcome: Outcome) -> Status:
    if outcome.status == "timeout":
        return "timeout"
    return "compile" if outcome.step == "compile" else "runtime"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attempt:
    """What another process needs to know. kept: see `make_subject`."""

    recipe: Recipe
    kernel: str
    config: Config
    budget: Budget
    bandwidth: Bandwidth | None
    kept: Path
    cores: Cores


def _attempt(one: _Attempt) -> Measurement:
    workers.step("subject")
    subject = _subject(one.recipe, one.kept, one.cores)
    return evaluate(
        find_kernel(one.kernel),
        subject,
        config=one.config,
        budget=one.budget,
        bandwidth=one.bandwidth,
        cold=one.recipe.cold,
        serves=True,
    )


@functools.lru_cache(maxsize=1)
def _subject(recipe: Recipe, kept: Path, cores: Cores) -> Subject:
    """Made once a process."""
    os.sched_setaffinity(0, cores.timing)
    device = recipe.where()
    if device.kind == "cpu":
        set_threads(device.units)
        _limit_memory(device)
    tensor = random_tensor(recipe.spec, recipe.n, recipe.k, seed=recipe.seed)
    return make_subject(tensor, recipe.m, device, dtype=recipe.dtype, seed=recipe.seed, kept=kept)


def _limit_memory(device: Device) -> None:
    """A config that asks for too much fails alone, before the system ends other processes."""
    page = os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * page
        most = now + int(_MEMORY_SHARE * device.memory_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
