"""Predicted time: a config's counts held against a device's rates. Never a measurement.

Of each launch, every resource takes what it has to do over its rate, and the slowest decides; the
launches of a call follow one another, each with a fixed cost. Multiprocessors work by whole blocks,
so what they do themselves (issue, L1 and shared memory, tensor cores) takes as long as the busiest
one does. Latency is what one warp after another in the same place takes: its waits, and its own
work between them, which few warps don't hide.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autotune.candidates import Candidates
from vqkernels.device import Device
from vqkernels.errors import BackendError
from vqkernels.kernel import Kernel
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.work import Work

__all__ = [
    "RESOURCES",
    "Prediction",
    "best_configs",
    "byte_floor",
    "predict",
    "predict_work",
    "predictable",
]

RESOURCES = ("hbm", "l2", "shared", "issue", "tensor", "latency")

# The share of a peak that good code reaches. HBM: gpu-benches reads what no L2 holds at 0.81
# (H200), 0.85 to 0.92 (A100), 0.97 (H100 PCIe) and 0.98 (L40) of the data sheet's rate. The others
# are assumed, for no GPU has run the kernels; the L2's, because its rate is of whole lines and a
# gather asks for single sectors.
_REACHED = {"hbm": 0.9, "l2": 0.7, "shared": 0.9, "issue": 0.8, "tensor": 0.75}

# A space of up to this many is predicted whole, 0.3 ms a config; of a larger one as many at random,
# then from the best few wherever a change of one parameter is predicted to be faster.
_WHOLE, _CLIMBS = 400, 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one call: `fixed_s` for its launches and `by_resource`, summed over launches.

    seconds: what the launches take one after another: their fixed cost and, of each, its slowest
    resource. binds: the resource with most of that time, or `fixed`.
    """

    seconds: float
    fixed_s: float
    by_resource: Mapping[str, float]
    binds: str


def predictable(kernel: Kernel, device: Device) -> str | None:
    """None, or the sentence that says why no time is predicted."""
    if kernel.work is None:
        return f"{kernel.id} doesn't say what its configs do"
    if not device.rates or not device.multiprocessor or not device.bandwidth:
        return f"{device.name}: its rates are unknown; `vqbench list devices` names known GPUs"
    return None


def predict(kernel: Kernel, config: Config, problem: Problem, device: Device) -> Prediction:
    """The predicted time of a config. Raises BackendError where nothing can be predicted."""
    if reason := predictable(kernel, device):
        raise BackendError(reason)
    assert kernel.work is not None, "what is predictable says its work"
    return predict_work(kernel.work(config, problem, device), device)


def predict_work(launches: Sequence[Work], device: Device) -> Prediction:
    """The predicted time of `launches`, one after another, on a device with rates."""
    times = [_times(work, device) for work in launches]
    fixed = device.rates["launch_s"] * len(launches)
    slowest = [max(one, key=lambda name: one[name]) for one in times]
    binding: dict[str, float] = {"fixed": fixed}
    for one, name in zip(times, slowest, strict=True):
        binding[name] = binding.get(name, 0.0) + one[name]
    return Prediction(
        seconds=sum(binding.values()),
        fixed_s=fixed,
        by_resource={name: sum(one[name] for one in times) for name in RESOURCES},
        binds=max(binding, key=lambda name: binding[name]),
    )


def best_configs(
    kernel: Kernel, candidates: Candidates, problem: Problem, device: Device, count: int
) -> list[tuple[Config, Prediction]]:
    """The `count` configs that are predicted to be fastest, of those that were looked at.

    Of configs that the prediction can't tell apart, one; the default is among what is looked at.
    The same ones on every run. Raises BackendError where nothing can be predicted.
    """
    if reason := predictable(kernel, device):
        raise BackendError(reason)

    @functools.cache
    def seconds(index: int) -> float:
        return _seconds(kernel, candidates[index], problem, device)

    looked = set(candidates.sample(np.random.default_rng(0), _WHOLE).tolist())
    if (default := kernel.default(problem, device)) in candidates:
        looked.add(candidates.index(default))
    if len(candidates) > _WHOLE:
        for start in sorted(looked, key=lambda at: (seconds(at), at))[:_CLIMBS]:
            looked |= _climb(start, seconds, candidates)
    alike: dict[float, int] = {}
    for at in sorted(looked, key=lambda at: (seconds(at), at)):
        alike.setdefault(seconds(at), at)
    alike.pop(math.inf, None)
    chosen = [candidates[at] for at in list(alike.values())[:count]]
    return [(config, predict(kernel, config, problem, device)) for config in chosen]


def _climb(start: int, seconds: Callable[[int], float], candidates: Candidates) -> set[int]:
    """What is met on the way down from `start` to a config without a faster neighbour."""
    met, at = {start}, start
    while True:
        around = candidates.neighbours(at).tolist()
        met.update(around)
        best = min(around, key=lambda one: (seconds(one), one), default=at)
        if seconds(best) >= seconds(at):
            return met
        at = best


def _seconds(kernel: Kernel, config: Config, problem: Problem, device: Device) -> float:
    """The predicted time; infinite for what a block's shared memory doesn't hold."""
    assert kernel.work is not None, kernel.id
    launches = kernel.work(config, problem, device)
    most = math.inf if device.shared_bytes is None else device.shared_bytes
    if max(launch.shared_bytes for launch in launches) > most:
        return math.inf
    return predict_work(launches, device).seconds


def byte_floor(nbytes: int, device: Device) -> float:
    """Seconds that main memory takes for `nbytes` at its peak: nothing is faster, cold."""
    assert device.bandwidth is not None, device.name
    return nbytes / device.bandwidth


def _times(work: Work, device: Device) -> dict[str, float]:
    assert device.bandwidth is not None, device.name
    rates, unit = device.rates, device.multiprocessor
    clock = rates["clock_hz"]
    # blocks of the busiest multiprocessor, in all and at once
    blocks, resident = math.ceil(work.blocks / device.units), _resident(work, unit)
    share, warps = blocks / work.blocks, work.warps * min(resident, blocks)
    # a warp issues one instruction a clock at most, to the tensor cores of its own quarter
    slots = min(unit["issue_slots"], warps)
    tensor = device.flops.get(work.tensor_dtype, math.inf) / device.units / unit["issue_slots"]
    peaks = {
        "hbm": work.hbm_bytes / device.bandwidth,
        "l2": work.l2_bytes / rates["l2_bandwidth"],
        "shared": work.wavefronts * share * 128 / unit["wavefront_bytes"] / clock,
        "issue": work.instructions * share / slots / clock,
        "tensor": work.tensor_flops * share / slots / tensor,
    }
    times = {name: seconds / _REACHED[name] for name, seconds in peaks.items()}
    waits = (
        work.hbm_trips * rates["memory_latency_clocks"]
        + work.l2_trips * rates["l2_latency_clocks"]
        + work.shared_trips * rates["l1_latency_clocks"]
    )
    waves = math.ceil(work.blocks / (device.units * resident))
    # between two waits a warp does its own part of what the multiprocessor does
    own = max(times["shared"], slots * times["issue"], slots * times["tensor"]) / warps
    return {**times, "latency": waves * waits / clock + own}


def _resident(work: Work, unit: Mapping[str, int]) -> int:
    """Blocks that a multiprocessor holds at once; 1 where the counts say that none fits."""
    # registers go to a warp in steps of 256; a block's shared memory has 1 KB of the system's
    a_warp = -(-32 * work.registers // 256) * 256
    bounds = [unit["blocks"], unit["threads"] // work.threads]
    bounds.append(unit["registers"] // (a_warp * work.warps))
    if work.shared_bytes:
        bounds.append(unit["shared_bytes"] // (work.shared_bytes + 1024))
    return max(1, min(bounds))
