"""Evaluate a kernel and config on a subject: compile, check against the oracle, then time.

Nothing is timed that has not passed, and the buffers that were timed are checked again after.
Several products that run one after the other (the layers of a decoder block) are one call too:
each is held to all of it, and they are timed together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from autotune import memory, workers
from autotune.bandwidth import Bandwidth, measure_bandwidth
from autotune.measurement import Correctness, Measurement, Status, Timer, Timing
from autotune.subject import Buffer, Subject, make_subject
from autotune.timers import Budget, capture, cold_copies, take_samples
from vqkernels import oracle
from vqkernels.errors import VqError
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.oracle import Check, Reference
from vqkernels.space import Config

__all__ = ["Step", "Subject", "check", "evaluate", "evaluate_steps", "make_subject"]

# Part of a weight may stay in the last-level cache between its turns (replacement isn't strict
# LRU) and the bandwidth is itself measured: a time is impossible only clearly below the floor.
_FLOOR_MARGIN = 1.25

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Step:
    """One product of a call: a kernel on a subject, in a config (its default where None)."""

    kernel: Kernel
    subject: Subject
    config: Config | None = None


@dataclasses.dataclass
class _EndError(Exception):
    """Ends an attempt with a status and a reason."""

    status: Status
    reason: str


@dataclasses.dataclass(frozen=True)
class _Made:
    """A step that is compiled and packed."""

    kernel: Kernel
    subject: Subject
    run: Run
    packed: Packed
    declared: Footprint
    compile_s: float

    def call(self, x: Tensor, out: Tensor) -> None:
        """Run to the end; what fails in any way is a status."""

        def done() -> None:
            self.run(self.packed, x, out)
            _wait(self.subject.place)

        _guarded(done, "runtime")

    def buffer(self) -> Buffer:
        return Buffer.make(self.subject.problem, self.subject.place)


def evaluate(
    kernel: Kernel,
    subject: Subject,
    *,
    config: Config | None = None,
    budget: Budget | None = None,
    bandwidth: Bandwidth | None = None,
    cold: bool = True,
    timer: Timer | None = None,
    serves: bool = False,
) -> Measurement:
    """One attempt, whatever happens: a config that fails is a status, not an exception.

    config: the kernel's default where None. bandwidth: for the floor; no floor without it.
    timer: the device's own where None. serves: hold it to what `check` does besides.
    """
    (measured,) = evaluate_steps(
        [Step(kernel, subject, config)],
        timers=(timer,),
        budget=budget,
        bandwidth=bandwidth,
        cold=cold,
        serves=serves,
    )
    return measured


def check(kernel: Kernel, subject: Subject, config: Config | None = None) -> Measurement:
    """As `evaluate`, but never timed, and held to what serving on a GPU asks for besides.

    That is the same bits on every run, and a CUDA graph that can be captured and replayed.
    """
    with _current(subject):
        try:
            facts, _ = _facts([_make(Step(kernel, subject, config))], serves=True)
        except _EndError as end:
            return Measurement(status=end.status, reason=end.reason)
    return facts


def evaluate_steps(
    steps: Sequence[Step],
    *,
    timers: Sequence[Timer | None],
    budget: Budget | None = None,
    bandwidth: Bandwidth | None = None,
    cold: bool = True,
    serves: bool = False,
) -> list[Measurement]:
    """`steps` on one device, in order, as one call: a measurement for each of `timers`.

    A call that is right but longer than the budget allows is a constraint with its correctness.
    """
    budget = budget or Budget()
    with _current(steps[0].subject):
        try:
            workers.step("compile")
            made = [_make(step) for step in steps]
            workers.step("check")
            facts, seconds = _facts(made, serves=serves)
        except _EndError as end:
            return [Measurement(status=end.status, reason=end.reason)] * len(timers)
        limit = budget.longest_call_s
        if limit is not None and seconds > limit:
            reason = f"right, but a call takes {seconds:.2g} s: none above {limit:g} s is timed"
            return [dataclasses.replace(facts, status="constraint", reason=reason)] * len(timers)
        workers.step("time")
        return [_timed(made, facts, timer, budget, bandwidth, cold) for timer in timers]


def _current(subject: Subject) -> contextlib.AbstractContextManager[Any]:
    """The subject's GPU as torch's current one: kernels are launched there."""
    on_gpu = subject.place != "cpu"
    return torch.cuda.device(subject.device.index) if on_gpu else contextlib.nullcontext()


def _make(step: Step) -> _Made:
    """Compile and pack, once the config is known to fit the device."""
    kernel, subject = step.kernel, step.subject
    config, declared = _choose(step)

    def build() -> tuple[Run, Packed]:
        packed = kernel.pack(subject.source(kernel), config, subject.problem).to(subject.place)
        return kernel.compile(config, subject.problem, subject.device), packed

    start = time.perf_counter()
    run, packed = _guarded(build, "compile")
    took = time.perf_counter() - start
    if packed.nbytes > declared.weight_bytes:
        raise _EndError(
            "incorrect",
            f"packs {packed.nbytes:,} bytes but declares {declared.weight_bytes:,}",
        )
    # a copy: what was packed may share memory with the subject, which other kernels are held to
    return _Made(kernel, subject, run, packed.clone(), declared, took)


def _choose(step: Step) -> tuple[Config, Footprint]:
    kernel, problem, device = step.kernel, step.subject.problem, step.subject.device
    if reason := _guarded(lambda: kernel.supports(problem, device), "compile"):
        raise _EndError("constraint", reason)
    chosen = step.config
    if chosen is None:
        chosen = _guarded(lambda: kernel.default(problem, device), "compile")
    try:
        kernel.space.check(chosen)
    except VqError as error:
        raise _EndError("constraint", str(error)) from error
    declared = _guarded(lambda: kernel.footprint(chosen, problem, device), "compile")
    if device.shared_bytes is not None and declared.shared_bytes > device.shared_bytes:
        raise _EndError(
            "constraint",
            f"needs {declared.shared_bytes:,} bytes of shared memory a block; "
            f"{device.name} has {device.shared_bytes:,}",
        )
    return chosen, declared


def _guarded(action: Callable[[], T], status: Status) -> T:
    try:
        return action()
    except _EndError:
        raise
    except Exception as error:  # a kernel may fail in any way; the reason is kept
        line = str(error).strip().splitlines()
        first = line[0] if line else "no message"
        raise _EndError(status, f"{type(error).__name__}: {first}") from error


def _wait(place: str) -> None:
    if place != "cpu":
        torch.cuda.synchronize(place)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, so that a NaN equals itself."""
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _facts(made: Sequence[_Made], *, serves: bool) -> tuple[Measurement, float]:
    """Everything but samples, once each step has passed; and about how long a call takes."""
    verdicts = [_check(one) for one in made]
    for one in made if serves else ():
        _serves(one)
    peaks, seconds = zip(*(_peak(one) for one in made), strict=True)
    names = {name for one in made for name in one.subject.controls}
    facts = Measurement(
        status="checked",
        correctness=Correctness(
            worst=max(verdict.worst for verdict in verdicts),
            max_abs=max(verdict.max_abs for verdict in verdicts),
            relative_rms=max(verdict.relative_rms for verdict in verdicts),
            controls={
                name: all(one.subject.controls.get(name, True) for one in made)
                for name in sorted(names)
            },
        ),
        weight_bytes=sum(one.packed.nbytes for one in made),
        peak_bytes=None if None in peaks else max(peaks),
        moved_bytes=sum(one.packed.nbytes + one.subject.problem.activation_bytes for one in made),
        flops=sum(one.declared.flops for one in made),
        compile_s=sum(one.compile_s for one in made),
    )
    return facts, sum(seconds)


def _check(made: _Made) -> Check:
    """The worse verdict of both batches; inputs unchanged, guards whole."""
    subject, worst = made.subject, None
    before = {name: array.clone() for name, array in made.packed.arrays.items()}
    for x, expected in zip(subject.xs, subject.references, strict=True):
        buffer, here = made.buffer(), x.clone()
        made.call(here, buffer.out)
        if not _same(here, x):
            raise _EndError("incorrect", "writes to its input x")
        verdict = _verdict(made, buffer, expected)
        worst = verdict if worst is None or verdict.worst > worst.worst else worst
    if any(not _same(before[name], array) for name, array in made.packed.arrays.items()):
        raise _EndError("incorrect", "writes to its packed weight")
    assert worst is not None, "a subject has two batches"
    return worst


def _verdict(made: _Made, buffer: Buffer, expected: Reference) -> Check:
    if not buffer.guards_hold():
        raise _EndError("incorrect", "writes outside its output")
    kernel, problem = made.kernel, made.subject.problem
    verdict = oracle.check(
        buffer.out, expected, weights=kernel.rounds_to(problem), chain=kernel.half_chain
    )
    if not verdict.passed:
        raise _EndError(
            "incorrect",
            f"error {verdict.worst:.3g} times its bound (max abs {verdict.max_abs:.3g})",
        )
    return verdict


def _peak(made: _Made) -> tuple[int | None, float]:
    """Bytes allocated beside weight, x and out by a call, held against the footprint; its time."""
    buffer, x = made.buffer(), made.subject.xs[0].clone()
    seconds = 0.0

    def call() -> None:
        nonlocal seconds
        start = time.perf_counter()
        made.call(x, buffer.out)
        seconds = time.perf_counter() - start

    peak = memory.peak_during(call, made.subject.place)
    declared = made.declared.workspace_bytes
    if peak is not None and peak > declared + memory.SLACK:
        raise _EndError(
            "incorrect",
            f"allocates {peak:,} bytes a call but declares {declared:,}: a hidden copy",
        )
    return peak, seconds


def _serves(made: _Made) -> None:
    """End unless the kernel gives the same bits twice and, on a GPU, runs in a CUDA graph."""
    subject = made.subject
    x, first, again = subject.xs[0].clone(), made.buffer(), made.buffer()
    made.call(x, first.out)
    made.call(x, again.out)
    if not _same(first.whole, again.whole):
        raise _EndError("incorrect", "gives other bits for the same input")
    if subject.place == "cpu":
        return

    def replayed() -> None:
        graph = capture([lambda: made.run(made.packed, x, again.out)])
        again.poison()
        x.copy_(subject.xs[1])
        graph.replay()
        torch.cuda.synchronize()

    try:
        _guarded(replayed, "runtime")
    except _EndError as end:
        raise _EndError("runtime", f"in a CUDA graph: {end.reason}") from end
    _verdict(made, again, subject.references[1])


def _timed(
    made: Sequence[_Made],
    facts: Measurement,
    timer: Timer | None,
    budget: Budget,
    bandwidth: Bandwidth | None,
    cold: bool,
) -> Measurement:
    """`facts` with samples, or what went wrong while they were taken."""
    try:
        samples, timing = _time(made, timer, budget, cold)
    except _EndError as end:
        return Measurement(status=end.status, reason=end.reason)
    weight = sum(one.packed.nbytes for one in made)
    floor = weight / (_FLOOR_MARGIN * bandwidth.best) if bandwidth and cold else None
    median = sorted(samples)[len(samples) // 2]
    if floor is not None and median < floor:
        # a shared machine may have read memory slowly when it was asked: it is asked once more
        again = measure_bandwidth(made[0].subject.device)
        floor = min(floor, weight / (_FLOOR_MARGIN * again.best))
    if floor is not None and median < floor:
        reason = f"median below the floor of {floor * 1e6:.3g} us: it did not do the work"
        return Measurement(status="incorrect", reason=reason)
    return dataclasses.replace(
        facts, status="ok", samples_s=tuple(samples), timing=timing, floor_s=floor
    )


def _time(
    made: Sequence[_Made], timer: Timer | None, budget: Budget, cold: bool
) -> tuple[list[float], Timing]:
    device = made[0].subject.device
    count = cold_copies(sum(one.packed.nbytes for one in made), device) if cold else 1
    copies = [[one.packed.clone() for one in made] for _ in range(count)]
    # both batches of each step
    xs = [[one.subject.xs[turn].clone() for one in made] for turn in (0, 1)]
    buffers = [[one.buffer() for one in made] for _ in xs]

    def call(turn: int) -> None:
        batch = turn % 2
        for one, weight, x, buffer in zip(
            made, copies[turn % count], xs[batch], buffers[batch], strict=True
        ):
            one.run(weight, x, buffer.out)

    # every copy meets both batches, and no copy comes twice in a row
    turns = range(count * (1 + count % 2))
    calls = [functools.partial(call, turn) for turn in turns]

    def judge(references: Callable[[Subject], Sequence[Reference]]) -> None:
        for batch, row in enumerate(buffers):
            for one, buffer in zip(made, row, strict=True):
                _verdict(one, buffer, references(one.subject)[batch])

    samples = _guarded(
        lambda: take_samples(calls, device, budget, cold=cold, timer=timer), "runtime"
    )
    judge(lambda subject: subject.references)
    # the same addresses with x exchanged and out poisoned: a kernel that stopped working, that
    # remembers outputs by address, or a graph that holds nothing shows
    for x, other in zip(xs[0], xs[1], strict=True):
        kept = x.clone()
        x.copy_(other)
        other.copy_(kept)
    for buffer in (buffer for row in buffers for buffer in row):
        buffer.poison()
    _guarded(samples.again, "runtime")
    _guarded(lambda: _wait(made[0].subject.place), "runtime")
    judge(lambda subject: subject.references[::-1])
    return samples.seconds, dataclasses.replace(samples.timing, copies=count)
