"""A kernel whose calls take longer by a share of their own time: what a gate has to notice."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Kernel, Packed, Run
from vqkernels.problem import Problem
from vqkernels.space import Config

__all__ = ["slowed"]

# A spin of so many cycles is long against the microseconds of a launch: 0.5 ms at 2 GHz.
_CYCLES = 1 << 20
_CALLS = 5


def slowed(kernel: Kernel, share: float) -> Kernel:
    """`kernel`, each of whose calls is delayed by `share` of what it took."""

    def compile(config: Config, problem: Problem, device: Device) -> Run:
        honest = kernel.compile(config, problem, device)
        return _on_gpu(honest, share) if device.kind == "cuda" else _on_cpu(honest, share)

    return dataclasses.replace(kernel, compile=compile)


def _on_cpu(honest: Run, share: float) -> Run:
    def run(packed: Packed, x: Tensor, out: Tensor) -> None:
        start = time.perf_counter_ns()
        honest(packed, x, out)
        end = time.perf_counter_ns()
        end += int(share * (end - start))
        while time.perf_counter_ns() < end:
            pass

    return run


def _on_gpu(honest: Run, share: float) -> Run:
    """A kernel that spins, launched behind each call; how long is found at the first."""
    cycles: int | None = None

    def run(packed: Packed, x: Tensor, out: Tensor) -> None:
        nonlocal cycles
        honest(packed, x, out)
        if cycles is None:
            call_s = _seconds(lambda: honest(packed, x, out))
            cycle_s = _seconds(lambda: _spin(_CYCLES)) / _CYCLES
            cycles = round(share * call_s / cycle_s)
        _spin(cycles)

    return run


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _seconds(call: Any) -> float:
    """Median over some calls, each between two events."""
    taken = []
    for _ in range(_CALLS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) * 1e-3)
    return float(statistics.median(taken))
