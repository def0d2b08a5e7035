"""Evaluate a kernel and config on a subject: compile, check against the oracle, then time.

Nothing is timed that has not passed (`escapes`), and the buffers that were timed are checked again
after, with other contents (`rotation`).
Several products that run one after the other (the layers of a decoder block) are one call too:
each is held to all of it, and they are timed together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from autotune import escapes, workers
from autotune.bandwidth import Bandwidth, measure_bandwidth
from autotune.made import EndError, Made, Step, guarded, make
from autotune.measurement import Correctness, Measurement, Timer
from autotune.rotation import Rotation
from autotune.subject import Subject, make_subject
from autotune.timers import Budget, capture, cold_copies, take_samples
from vqkernels.kernel import Kernel, Packed
from vqkernels.space import Config

__all__ = ["Step", "Subject", "check", "evaluate", "evaluate_steps", "make_subject"]

# Part of a weight may stay in the last-level cache between its turns (replacement isn't strict
# LRU) and the bandwidth is itself measured; a data sheet's operations are at a clock that a cool
# device exceeds (H100: 989 TFLOP/s at 1.83 GHz, and up to 1.98). So a time is impossible only
# clearly below the floor.
_FLOOR_MARGIN = 1.25


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
            facts, _, _ = _facts([make(Step(kernel, subject, config))], serves=True)
        except EndError as end:
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
            made = [make(step) for step in steps]
            workers.step("check")
            facts, others, seconds = _facts(made, serves=serves)
        except EndError as end:
            return [Measurement(status=end.status, reason=end.reason)] * len(timers)
        limit = budget.longest_call_s
        if limit is not None and seconds > limit:
            reason = f"right, but a call takes {seconds:.2g} s: none above {limit:g} s is timed"
            return [dataclasses.replace(facts, status="constraint", reason=reason)] * len(timers)
        workers.step("time")
        return [_timed(made, others, facts, timer, budget, bandwidth, cold) for timer in timers]


def _current(subject: Subject) -> contextlib.AbstractContextManager[Any]:
    """The subject's GPU as torch's current one: kernels are launched there."""
    on_gpu = subject.place != "cpu"
    return torch.cuda.device(subject.device.index) if on_gpu else contextlib.nullcontext()


def _facts(made: Sequence[Made], *, serves: bool) -> tuple[Measurement, list[Packed], float]:
    """Everything but samples, once each step has passed; each step's other weight; and about how
    long a call takes.
    """
    verdicts = [escapes.right_output(one) for one in made]
    for one in made if serves else ():
        _serves(one)
    others = [escapes.other_weight(one) for one in made]
    ran = [escapes.peak(one, other) for one, other in zip(made, others, strict=True)]
    peaks, seconds = zip(*ran, strict=True)
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
    return facts, others, sum(seconds)


def _serves(made: Made) -> None:
    """End unless the kernel gives the same bits twice and, on a GPU, runs in a CUDA graph."""
    subject = made.subject
    x, first, again = subject.xs[0].clone(), made.buffer(), made.buffer()
    made.call(x, first.out)
    made.call(x, again.out)
    for buffer in (first, again):
        escapes.verdict(made, buffer, subject.references[0])
    if not escapes.same(first.whole, again.whole):
        raise EndError("incorrect", "gives other bits for the same input")
    if subject.place == "cpu":
        return

    def replayed() -> None:
        graph = capture([lambda: made.run(made.packed, x, again.out)])
        again.poison()
        x.copy_(subject.xs[1])
        graph.replay()
        torch.cuda.synchronize()

    try:
        guarded(replayed, "runtime")
    except EndError as end:
        raise EndError("runtime", f"in a CUDA graph: {end.reason}") from end
    escapes.verdict(made, again, subject.references[1])


def _timed(
    made: Sequence[Made],
    others: Sequence[Packed],
    facts: Measurement,
    timer: Timer | None,
    budget: Budget,
    bandwidth: Bandwidth | None,
    cold: bool,
) -> Measurement:
    """`facts` with samples, or what went wrong while they were taken."""
    device = made[0].subject.device
    count = cold_copies(sum(one.packed.nbytes for one in made), device) if cold else 1
    try:
        rotation = Rotation.make(made, count)
        samples = rotation.sample(
            lambda calls: take_samples(calls, device, budget, cold=cold, timer=timer)
        )
        rotation.hold(samples.replay, others)
        floor = _floor(made, bandwidth if cold else None, statistics.median(samples.seconds))
    except EndError as end:
        return Measurement(status=end.status, reason=end.reason)
    return dataclasses.replace(
        facts,
        status="ok",
        samples_s=tuple(samples.seconds),
        timing=dataclasses.replace(samples.timing, copies=count),
        floor_s=floor,
    )


def _floor(made: Sequence[Made], bandwidth: Bandwidth | None, median: float) -> float | None:
    """The least time for the weight's bytes and the operations; ends an attempt that took less.

    None where neither rate is known. bandwidth: None too where the weight may be in cache.
    """
    floors = []
    if bandwidth is not None:
        weight = sum(one.packed.nbytes for one in made) / _FLOOR_MARGIN
        best = bandwidth.best
        if median < weight / best:
            # a shared machine may have read memory slowly when it was asked: it is asked once more
            best = max(best, measure_bandwidth(made[0].subject.device).best)
        floors.append(("read its weight", weight / best))
    rates = [_fastest_unit(one) for one in made]
    if all(rates):
        seconds = sum(one.declared.flops / rate for one, rate in zip(made, rates, strict=True))
        floors.append(("do its operations", seconds / _FLOOR_MARGIN))
    for what, floor in floors:
        if median < floor:
            reason = f"median below the floor of {floor * 1e6:.3g} us to {what}"
            raise EndError("incorrect", f"{reason}: it did not do the work")
    return max((floor for _, floor in floors), default=None)


def _fastest_unit(made: Made) -> float:
    """Operations a second of the device's fastest unit that can serve a problem; 0: unknown.

    x or the entries may be of the faster type; fp32 may be split into halves for tensor cores.
    """
    problem = made.subject.problem
    names = [problem.dtype, problem.spec.codebook_dtype]
    if problem.dtype == "float32":
        names += ["float16", "bfloat16"]
    return max(made.subject.device.flops.get(name, 0.0) for name in names)
