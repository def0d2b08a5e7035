"""Processes that measure nothing: what a gate's loop asks for, with times that a test writes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

from autotune.bandwidth import Bandwidth
from autotune.measurement import Correctness, Measurement, Timing
from bench.gate import run as gate_run
from bench.gate import session as gate_session
from bench.gate.job import Job, Target
from bench.gate.process import Measured, Process
from bench.gate.sides import Side, Who
from vqkernels.presets import parse_format

RIGHT = Correctness(worst=0.1, max_abs=0.1, relative_rms=0.1, controls={})
TIMING = Timing(
    timer="perf_counter", warmup_s=0, copies=2, cache={"codes": "cold"}, threads=2, pinned=True
)
DEVICE = {"kind": "cpu", "name": "Test", "arch": "none", "units": 2, "uuid": None, "driver": None}
VERSIONS = {"python": "3.11", "torch": "2.13"}


def target(kernel: str = "numba/table", **fields: Any) -> Target:
    values: dict[str, Any] = {
        "source": "toy",
        "fused": False,
        "workload": "toy",
        "layer": "q",
        "format": "rq-2x256x8",
        "rows": (64,),
        "k": 64,
        "m": 1,
        "dtype": "float32",
        "kernel": kernel,
    }
    return Target(**values | fields)


def right(seconds: float) -> Measurement:
    return Measurement(
        status="ok", samples_s=(seconds,) * 7, timing=TIMING, correctness=RIGHT, floor_s=None
    )


def wrong(status: str, reason: str = "said by the kernel") -> Measurement:
    return Measurement(status=status, reason=reason)  # type: ignore[arg-type]


@dataclasses.dataclass
class Fake:
    """Stands for `process.measure`.

    times: of the candidate over the baseline, by kernel; a float, a measurement, or a function of
    the number of the process. code: by side and kernel, where it isn't the side's name. noise:
    standard deviation of each process's log time, seeded. calls: sides, in order.
    """

    ratios: dict[str, float | Measurement | Callable[[int], Any]]
    code: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    noise: float = 0.002
    base: float | Measurement = 1e-3
    states: Callable[[int], Mapping[str, Any]] = lambda _: {"before": {}, "after": {}}
    device: Callable[[int], Mapping[str, Any]] = lambda _: DEVICE
    calls: list[str] = dataclasses.field(default_factory=list)
    cases: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, sides: Mapping[Who, Side], job: Job, harness: str) -> dict[Who, Process]:
        return {who: self.process(side, job) for who, side in sides.items()}

    def process(self, side: Side, job: Job) -> Process:
        number = len(self.calls)
        self.calls.append(side.what)
        self.cases.append(len(job.targets))
        rng = random.Random(number)
        measured = tuple(self._case(side, one, number, rng) for one in job.targets)
        return Process(self.device(number), VERSIONS, measured)

    def _case(self, side: Side, case: Target, number: int, rng: random.Random) -> Measured:
        value = self.base if side.what == "base" else self.ratios[case.kernel]
        value = value(number) if callable(value) else value
        if isinstance(value, Measurement):
            found = value
        else:
            seconds = value if side.what == "base" else 1e-3 * value
            found = right(seconds * (1 + side.slow) * (1 + rng.gauss(0, self.noise)))
        facts = {
            "code": self.code.get((side.what, case.kernel), side.what),
            "source": "s",
            "config": {},
            "spec": parse_format(case.format).to_dict(),
        }
        return Measured(case.name, found, self.states(number), facts)


def install(monkeypatch, fake: Fake, cases: tuple[Target, ...]) -> None:
    """Put `fake` and `cases` in the place of processes, inputs and the selection."""
    monkeypatch.setattr(gate_session, "measure", fake)
    monkeypatch.setattr(gate_run.Options, "cases", lambda self: cases)
    sides = {
        "baseline": Side(what="base", python="python"),
        "candidate": Side(what="cand", python="python"),
    }

    def make_sides(options, folder):
        slow = dataclasses.replace(sides["candidate"], slow=options.slow)
        found = {"baseline": sides["baseline"], "candidate": slow}
        return {who: one for who, one in found.items() if who == "candidate" or not options.stored}

    def make_inputs(options, cases, folder, progress):
        return gate_run.Inputs(
            {one.weight: ("uniform", None, 2.0) for one in cases},
            {one.name: "inputs" for one in cases},
            Bandwidth(1e10, 1e10, 1 << 20),
            {},
        )

    monkeypatch.setattr(gate_run, "make_sides", make_sides)
    monkeypatch.setattr(gate_run, "make_inputs", make_inputs)
