"""Inputs of a gate: weights and what the oracle says, made once and read by every process.

Both sides read the same bytes: a baseline's own quantizer or generator would give other codes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from autotune.bandwidth import Bandwidth, measure_bandwidth
from autotune.subject import Subject, make_subject
from autotune.timers import set_threads
from bench.gate.job import Target
from bench.weights import make_weight
from bench.workload import load_workload
from vqkernels import container
from vqkernels.device import Device, detect, detect_cpu
from vqkernels.parts import effective_bits
from vqkernels.presets import parse_format
from vqkernels.tensor import QuantizedTensor

__all__ = ["Facts", "bandwidth", "load_subject", "place", "prepare"]

# What records say of a weight: where its codes come from, its error, its effective bits.
Facts = tuple[str, float | None, float]

_NAME = "weight"


def place(device: str, threads: int) -> Device:
    """The device by torch's name; on a CPU this process then uses that many threads."""
    if device != "cpu":
        return detect(device)
    found = detect_cpu(threads)
    set_threads(found.units)
    return found


def bandwidth(device: str, threads: int) -> Bandwidth:
    """How fast the device reads memory, for the floors of all processes."""
    return measure_bandwidth(place(device, threads))


def prepare(folder: Path, cases: Sequence[Target], device: str, threads: int, seed: int) -> Facts:
    """Write the one weight of `cases`, and what the oracle says of it at each of their m.

    Raises VqError where there is none.
    """
    where, first = place(device, threads), cases[0]
    model = load_workload(first.source)
    model = model.fused() if first.fused else model
    layer = next(one for one in model.layers if one.name == first.layer)
    weight = make_weight(model, layer, parse_format(first.format), seed=seed)
    container.save(folder / first.weight, {_NAME: weight.tensor})
    for one in {case.answers: case for case in cases}.values():
        load_subject(folder, one, where, seed)
    bits = effective_bits([(weight.tensor.spec, first.n, first.k)]).per_weight()
    return weight.codes, weight.relative_error, bits


def load_subject(folder: Path, case: Target, device: Device, seed: int) -> Subject:
    """The inputs of a case, kept for the case that comes next."""
    key = (case.weight, case.answers)
    if key not in _kept:
        _kept.clear()  # frees the GPU's memory before the next are made
        _kept[key] = make_subject(
            _weight(folder / case.weight),
            case.m,
            device,
            dtype=case.dtype,
            seed=seed,
            kept=folder / case.answers,
        )
    return _kept[key]


_kept: dict[tuple[str, str], Subject] = {}


@functools.lru_cache(maxsize=1)
def _weight(path: Path) -> QuantizedTensor:
    return container.load(path)[_NAME]
