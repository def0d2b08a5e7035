"""Evaluate one kernel and config on one subject: compile, check against the oracle, then time.

Nothing is timed that has not passed, and the buffers that were timed are checked again after.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from autotune import memory
from autotune.bandwidth import Bandwidth
from autotune.measurement import Correctness, Measurement, Status, Timing
from autotune.timers import Budget, cold_copies, take_samples
from vqkernels import oracle
from vqkernels.device import Device
from vqkernels.errors import VqError
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.oracle import Check, Reference
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tensor import QuantizedTensor

__all__ = ["Subject", "evaluate", "make_subject"]

# Out stands between guards of this many elements: a store past its end shows.
_GUARD = 256
_SENTINEL = 12345.0

# Part of a weight may stay in the last-level cache between its turns (replacement isn't strict
# LRU) and the bandwidth is itself measured: a time is impossible only clearly below the floor.
_FLOOR_MARGIN = 1.25

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A weight and two batches of tokens with their references: what every kernel is held to.

    Two, so that consecutive timed calls never see the same x.
    """

    tensor: QuantizedTensor
    problem: Problem
    device: Device
    xs: tuple[Tensor, Tensor]
    references: tuple[Reference, Reference]
    controls: dict[str, bool]


@dataclasses.dataclass
class _EndError(Exception):
    """Ends an attempt with a status and a reason."""

    status: Status
    reason: str


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """An output between guards, poisoned with NaN."""

    whole: Tensor
    out: Tensor

    @classmethod
    def make(cls, problem: Problem, place: str) -> _Buffer:
        size = problem.m * problem.n
        whole = torch.full((size + 2 * _GUARD,), _SENTINEL, dtype=problem.torch_dtype, device=place)
        out = whole[_GUARD : _GUARD + size].view(problem.m, problem.n)
        out.fill_(float("nan"))
        return cls(whole, out)

    def guards_hold(self) -> bool:
        guards = torch.cat([self.whole[:_GUARD], self.whole[-_GUARD:]])
        return bool((guards == torch.tensor(_SENTINEL, dtype=guards.dtype)).all())


def make_subject(
    tensor: QuantizedTensor, m: int, device: Device, *, dtype: str = "float32", seed: int = 0
) -> Subject:
    """A subject with normal activations; x is rounded to `dtype` before the reference sees it."""
    problem = Problem(
        m=m,
        n=tensor.n,
        k=tensor.k,
        spec=tensor.spec,
        dtype=dtype,  # type: ignore[arg-type]  # Problem's Literal; the caller's choices are checked
        bias=tensor.bias is not None,
    )
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2 * m, tensor.k, generator=generator).to(problem.torch_dtype)
    expected = oracle.reference(tensor, both)
    return Subject(
        tensor=tensor,
        problem=problem,
        device=device,
        xs=(both[:m].clone(), both[m:].clone()),
        references=(expected.tokens(0, m), expected.tokens(m, 2 * m)),
        controls=oracle.negative_controls(tensor, both[:m]),
    )


def evaluate(
    kernel: Kernel,
    subject: Subject,
    *,
    config: Config | None = None,
    budget: Budget | None = None,
    bandwidth: Bandwidth | None = None,
    cold: bool = True,
) -> Measurement:
    """One attempt, whatever happens: a config that fails is a status, not an exception.

    config: the kernel's default where None. bandwidth: for the floor; no floor without it.
    """
    try:
        return _attempt(kernel, subject, config, budget or Budget(), bandwidth, cold)
    except _EndError as end:
        return Measurement(status=end.status, reason=end.reason)


def _attempt(
    kernel: Kernel,
    subject: Subject,
    config: Config | None,
    budget: Budget,
    bandwidth: Bandwidth | None,
    cold: bool,
) -> Measurement:
    problem = subject.problem
    chosen, declared = _choose(kernel, subject, config)
    run, packed, compile_s = _compile(kernel, subject, chosen)
    if packed.nbytes > declared.weight_bytes:
        raise _EndError(
            "incorrect",
            f"packs {packed.nbytes:,} bytes but declares {declared.weight_bytes:,}",
        )
    verdict = _check(kernel, run, packed, subject)
    peak = _peak(run, packed, subject, declared)
    samples, timing = _time(kernel, run, packed, subject, budget, cold)
    moved = packed.nbytes + problem.activation_bytes
    floor = packed.nbytes / (_FLOOR_MARGIN * bandwidth.best) if bandwidth and cold else None
    if floor is not None and sorted(samples)[len(samples) // 2] < floor:
        raise _EndError(
            "incorrect", f"median below the floor of {floor * 1e6:.3g} us: it did not do the work"
        )
    return Measurement(
        status="ok",
        samples_s=tuple(samples),
        timing=timing,
        correctness=Correctness(
            worst=verdict.worst,
            max_abs=verdict.max_abs,
            relative_rms=verdict.relative_rms,
            controls=subject.controls,
        ),
        weight_bytes=packed.nbytes,
        peak_bytes=peak,
        moved_bytes=moved,
        flops=declared.flops,
        floor_s=floor,
        compile_s=compile_s,
    )


def _choose(kernel: Kernel, subject: Subject, config: Config | None) -> tuple[Config, Footprint]:
    problem, device = subject.problem, subject.device
    if reason := _guarded(lambda: kernel.supports(problem, device), "compile"):
        raise _EndError("constraint", reason)
    chosen = config
    if chosen is None:
        chosen = _guarded(lambda: kernel.default(problem, device), "compile")
    try:
        kernel.space.check(chosen)
    except VqError as error:
        raise _EndError("constraint", str(error)) from error
    return chosen, _guarded(lambda: kernel.footprint(chosen, problem, device), "compile")


def _guarded(action: Callable[[], T], status: Status) -> T:
    try:
        return action()
    except _EndError:
        raise
    except Exception as error:  # a kernel may fail in any way; the reason is kept
        line = str(error).strip().splitlines()
        first = line[0] if line else "no message"
        raise _EndError(status, f"{type(error).__name__}: {first}") from error


def _compile(kernel: Kernel, subject: Subject, config: Config) -> tuple[Run, Packed, float]:
    problem, device = subject.problem, subject.device

    def build() -> tuple[Run, Packed]:
        packed = kernel.pack(subject.tensor, config, problem).to(device.torch_name)
        return kernel.compile(config, problem, device), packed

    start = time.perf_counter()
    run, packed = _guarded(build, "compile")
    took = time.perf_counter() - start
    # a copy: what was packed may share memory with the subject, which other kernels are held to
    return run, packed.clone(), took


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, so that a NaN equals itself."""
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _check(kernel: Kernel, run: Run, packed: Packed, subject: Subject) -> Check:
    """The worse verdict of both batches; inputs unchanged, guards whole."""
    worst: Check | None = None
    before = {name: array.clone() for name, array in packed.arrays.items()}
    for x, expected in zip(subject.xs, subject.references, strict=True):
        buffer = _Buffer.make(subject.problem, subject.device.torch_name)
        here = x.to(subject.device.torch_name, copy=True)
        _guarded(lambda x=here, out=buffer.out: run(packed, x, out), "runtime")  # type: ignore[misc]
        if not _same(here.cpu(), x):
            raise _EndError("incorrect", "writes to its input x")
        verdict = _verdict(kernel, subject.problem, buffer, expected)
        worst = verdict if worst is None or verdict.worst > worst.worst else worst
    if any(not _same(before[name], array) for name, array in packed.arrays.items()):
        raise _EndError("incorrect", "writes to its packed weight")
    assert worst is not None, "a subject has two batches"
    return worst


def _verdict(kernel: Kernel, problem: Problem, buffer: _Buffer, expected: Reference) -> Check:
    if not buffer.guards_hold():
        raise _EndError("incorrect", "writes outside its output")
    out = buffer.out.cpu()
    rounded = problem.dtype if kernel.rounds_weights else problem.rounded_to
    verdict = oracle.check(out, expected, weights=rounded)
    if not verdict.passed:
        raise _EndError(
            "incorrect",
            f"error {verdict.worst:.3g} times its bound (max abs {verdict.max_abs:.3g})",
        )
    return verdict


def _peak(run: Run, packed: Packed, subject: Subject, declared: Footprint) -> int | None:
    """Bytes allocated beside weight, x and out while a call runs, held against the footprint."""
    buffer = _Buffer.make(subject.problem, subject.device.torch_name)
    x = subject.xs[0].to(subject.device.torch_name, copy=True)
    peak = _guarded(
        lambda: memory.peak_during(lambda: run(packed, x, buffer.out), subject.device), "runtime"
    )
    if peak is not None and peak > declared.workspace_bytes + memory.SLACK:
        raise _EndError(
            "incorrect",
            f"allocates {peak:,} bytes a call but declares {declared.workspace_bytes:,}: "
            f"a hidden copy",
        )
    return peak


def _time(
    kernel: Kernel, run: Run, packed: Packed, subject: Subject, budget: Budget, cold: bool
) -> tuple[list[float], Timing]:
    device, place = subject.device, subject.device.torch_name
    count = cold_copies(packed.nbytes, device) if cold else 1
    copies = [packed.clone() for _ in range(count)]
    xs = [x.to(place, copy=True) for x in subject.xs]
    buffers = [_Buffer.make(subject.problem, place) for _ in xs]
    # an even number of calls alternates the batches on every copy
    calls = [
        lambda weight=copies[turn % count], x=xs[turn % 2], out=buffers[turn % 2].out: run(
            weight, x, out
        )
        for turn in range(count + count % 2)
    ]
    samples, timing = _guarded(lambda: take_samples(calls, device, budget, cold=cold), "runtime")
    for buffer, expected in zip(buffers, subject.references, strict=True):
        _verdict(kernel, subject.problem, buffer, expected)
    # the same addresses with x exchanged: a kernel that stopped working, or that remembers
    # outputs by address, leaves what was there
    for x, other in zip(xs, reversed(subject.xs), strict=True):
        x.copy_(other)
    for call in calls[:2]:
        _guarded(call, "runtime")
    for buffer, expected in zip(buffers, reversed(subject.references), strict=True):
        _verdict(kernel, subject.problem, buffer, expected)
    return samples, dataclasses.replace(timing, copies=count)
