"""What gpu-check's workers do: each task in a process that may hang, crash or lose the GPU.

Tasks name kernels, cases and formats, so that they are small and picklable; tensors are made where
they are used, and kept for the task that comes next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from autotune.bandwidth import Bandwidth
from autotune.evaluate import Step, check, evaluate_steps
from autotune.measurement import Measurement, Timer
from autotune.subject import Subject, make_subject
from autotune.timers import Budget, set_threads
from bench.environment import device_state
from bench.peers import peers
from bench.records import Case
from bench.run import describe
from bench.workload import Layer
from vqkernels.device import Device
from vqkernels.fuse import fuse
from vqkernels.kernel import Kernel, registry
from vqkernels.parts import effective_bits
from vqkernels.presets import parse_format
from vqkernels.problem import Dtype, Problem
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.testing import Case as Format
from vqkernels.testing import conformance_cases

__all__ = ["Conformance", "Result", "Site", "Timed", "all_kernels", "conform", "measure", "prepare"]

# A case, its measurement, and the state of the device before and after.
Result = tuple[Case, Measurement, Mapping[str, Any]]

# Rows of the weight that stands for a layer's where only its compilation counts: as many as keep
# the divisibility of the whole for which compilers specialise.
_FEW_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where tasks run. place: of the arrays, if not the device. small: cases for an interpreter."""

    device: Device
    place: str | None = None
    small: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conformance:
    """A kernel on a conformance case, at some m and dtypes."""

    site: Site
    kernel: str
    case: str
    tokens: tuple[tuple[int, Dtype], ...]

    def cases(self) -> list[Case]:
        """What the records say, also of a task that was lost."""
        one = formats(self.site.small)[self.case]
        return [
            describe(
                all_kernels()[self.kernel],
                Problem(m=m, n=one.n, k=one.k, spec=one.spec, dtype=dtype, bias=one.bias),
                self.site.device,
                workload="conformance",
                layer=self.case,
                name=self.case,
                seed=self.site.seed,
                weight=None,
            )
            for m, dtype in self.tokens
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Layers of a workload as one call: a kernel for each, one m and format.

    name: of a block of layers, in place of a kernel's; empty for one layer.
    """

    site: Site
    workload: str
    format: str
    layers: tuple[Layer, ...]
    kernels: tuple[str, ...]
    m: int
    dtype: Dtype
    timers: tuple[Timer, ...]
    budget: Budget = dataclasses.field(default_factory=Budget)
    bandwidth: Bandwidth | None = None
    name: str = ""

    def case(self) -> Case:
        """What the records say: of one layer, or of all with a step for each."""
        steps = [self._step(layer, at) for layer, at in zip(self.layers, self.kernels, strict=True)]
        if not self.name:
            return steps[0]
        parts = [
            {"layer": one.layer, "n": one.n, "k": one.k, "kernel": one.kernel, "config": one.config}
            for one in steps
        ]
        same = len(set(self.kernels)) == 1
        return dataclasses.replace(
            steps[0],
            layer="block",
            n=None,
            k=None,
            kernel=self.name,
            kernel_source=steps[0].kernel_source if same else None,
            config={},
            effective_bits=None,
            steps=parts,
        )

    def _step(self, layer: Layer, kernel: str) -> Case:
        return describe(
            all_kernels()[kernel],
            self.problem(layer),
            self.site.device,
            workload=self.workload,
            layer=layer.name,
            name=self.format,
            seed=self.site.seed,
            weight=None,
        )

    def problem(self, layer: Layer) -> Problem:
        """What is asked for a layer."""
        spec = layer.spec(self.format)
        return Problem(m=self.m, n=layer.n, k=layer.k, spec=spec, dtype=self.dtype)


def all_kernels() -> dict[str, Kernel]:
    """The registry's kernels and the peers', by id."""
    return {**registry().kernels, **peers()}


@functools.cache
def formats(small: bool) -> dict[str, Format]:
    """The conformance cases by name."""
    return {case.name: case.small() if small else case for case in conformance_cases()}


def conform(task: Conformance) -> list[Result]:
    """Check a kernel at every m of the task."""
    torch.set_num_threads(1)  # a worker a core
    kernel, one, site = all_kernels()[task.kernel], formats(task.site.small)[task.case], task.site
    results: list[Result] = []
    for case, (m, dtype) in zip(task.cases(), task.tokens, strict=True):
        problem = Problem(m=m, n=one.n, k=one.k, spec=one.spec, dtype=dtype, bias=one.bias)
        if reason := kernel.supports(problem, site.device):
            results.append((case, Measurement(status="constraint", reason=reason), {}))
            continue
        subject = make_subject(
            one.tensor, m, site.device, dtype=dtype, seed=site.seed, place=site.place
        )
        results.append((case, check(kernel, subject), {}))
    if site.device.kind == "cuda" and site.place is None:
        torch.cuda.empty_cache()  # the GPU is shared with the other workers
    return results


def prepare(tasks: tuple[Timed, ...]) -> int:
    """Compile what the tasks will launch, on a few rows, for the compilers' caches on disk.

    Returns how many were compiled. Fails where the first of them fails: the timing tells again.
    """
    torch.set_num_threads(1)
    done = 0
    for task in tasks:
        kernel, site = all_kernels()[task.kernels[0]], task.site
        whole = task.problem(task.layers[0])
        if kernel.supports(whole, site.device):
            continue
        config = kernel.default(whole, site.device)
        few = dataclasses.replace(whole, n=min(whole.n, _FEW_ROWS))
        place = site.place or site.device.torch_name
        packed = kernel.pack(_weight(task.format, (few.n, few.k)), config, few).to(place)
        x = torch.zeros(few.m, few.k, dtype=few.torch_dtype, device=place)
        out = torch.empty(few.m, few.n, dtype=few.torch_dtype, device=place)
        kernel.compile(config, few, site.device)(packed, x, out)
        done += 1
    return done


def measure(task: Timed) -> list[Result]:
    """Time the task's layers as one call, by each of its timers."""
    device = task.site.device
    if device.kind == "cpu":
        set_threads(device.units)
    steps = [
        Step(all_kernels()[kernel], _subject(task.site, task.format, layer, task.m, task.dtype))
        for layer, kernel in zip(task.layers, task.kernels, strict=True)
    ]
    before = device_state(device)
    measured = evaluate_steps(
        steps, timers=task.timers, budget=task.budget, bandwidth=task.bandwidth
    )
    state = {"before": before, "after": device_state(device)}
    weights = [(step.subject.problem.spec, step.subject.tensor) for step in steps]
    bits = effective_bits([(spec, one.n, one.k) for spec, one in weights]).per_weight()
    case = dataclasses.replace(task.case(), codes="uniform", effective_bits=bits)
    return [(case, one, state) for one in measured]


@functools.lru_cache(maxsize=8)
def _weight(name: str, shape: tuple[int, ...]) -> QuantizedTensor:
    *sizes, k = shape
    spec = parse_format(name)
    return fuse([random_tensor(spec, n, k, seed=i, fit=False) for i, n in enumerate(sizes)])


def _subject(site: Site, name: str, layer: Layer, m: int, dtype: Dtype) -> Subject:
    """The subject of a layer, kept: layers of one shape share it, and so do kernels."""
    global _kept
    group = (name, m, dtype)
    if _kept[0] != group:
        _kept = (group, {})  # frees the GPU's memory before the next are made
    subjects = _kept[1]
    if layer.shape not in subjects:
        subjects[layer.shape] = make_subject(
            _weight(name, layer.shape),
            m,
            site.device,
            dtype=dtype,
            seed=site.seed,
            place=site.place,
        )
    return subjects[layer.shape]


_kept: tuple[object, dict[tuple[int, ...], Subject]] = (None, {})
