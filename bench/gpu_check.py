"""gpu-check: what a GPU has to show, in one command: every kernel right, then how fast.

Correctness comes first and runs on all cores, since nearly all of it is compilation; then one
process has the GPU to itself and times layers, and the layers of a decoder block as one call.
Every case becomes a record, also one that crashed, hung, or that the time didn't reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autotune.bandwidth import Bandwidth, measure_bandwidth
from autotune.measurement import Measurement, Status, Timer
from autotune.timers import Budget
from autotune.workers import Outcome, Pool, Task
from bench.gpu_tasks import (
    Conformance,
    Result,
    Site,
    Timed,
    conform,
    formats,
    measure,
    prepare,
)
from bench.peers import peers
from bench.records import Case, RecordFile
from bench.workload import Layer, Workload
from vqkernels.device import Device
from vqkernels.errors import BackendError, UnsupportedError
from vqkernels.kernel import Kernel
from vqkernels.problem import Dtype

__all__ = ["BEST", "FUSED", "MS", "Plan", "correctness", "measured_bandwidth", "timing"]

MS = (1, 2, 4, 8, 16, 64, 256, 2048)

# The other half-precision dtype, at one m of each kind: few tokens, and a tile of tensor cores.
_BFLOAT16_MS = (1, 16)

# The block whose layers each run on the fastest kernel that was right; and with layers of one input
# as one, each on the fastest of those few that were fastest on its parts.
BEST, FUSED = "best", "best-fused"
_FUSED_CANDIDATES = 3

# Fusing saves launches, some microseconds each: timed where products are not much longer.
_LAUNCH_BOUND_M = 64

# Ten compilations and checks; a build of a peer's CUDA extension takes minutes, once.
_CONFORM_S, _PREPARE_S, _MEASURE_S = 120.0, 240.0, 60.0

# 7 to 100 samples, most in 40 ms: a thousand measurements must fit in minutes. Kernels for few
# tokens would spend those on many.
BUDGET = Budget(warmup_s=0.01, seconds=0.04, max_samples=100, longest_call_s=0.05)

Record = dict[str, Any]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a check. `dtype` is of the timing; ms likewise."""

    site: Site
    checked: tuple[Kernel, ...]
    timed: tuple[Kernel, ...]
    workload: Workload
    formats: tuple[str, ...]
    ms: tuple[int, ...]
    tokens: tuple[tuple[int, Dtype], ...]
    dtype: Dtype
    jobs: int
    budget: Budget = BUDGET

    @property
    def device(self) -> Device:
        """The device that is checked."""
        return self.site.device

    @property
    def timers(self) -> tuple[Timer, ...]:
        """Of single layers: calls as they are, and as a graph has them."""
        return ("cuda_event", "cuda_graph") if self.device.kind == "cuda" else ("perf_counter",)

    def shapes(self) -> list[Layer]:
        """The first layer of each shape, smallest first."""
        first: dict[tuple[int, int], Layer] = {}
        for layer in self.workload.layers:
            first.setdefault((layer.n, layer.k), layer)
        return sorted(first.values(), key=lambda layer: layer.n * layer.k)

    def parallel(self) -> list[Task]:
        """What runs on all cores: compilations for the timing, the slowest first, and checks."""
        tasks = [
            Task(prepare, (tuple(self._layers(kernel, name)),), _PREPARE_S)
            for kernel in sorted(self.timed, key=lambda kernel: kernel.id not in peers())
            for name in self.formats
        ]
        for case in formats(self.site.small):
            for kernel in self.checked:
                one = Conformance(site=self.site, kernel=kernel.id, case=case, tokens=self.tokens)
                tasks.append(Task(conform, (one,)))
        return tasks

    def _layers(self, kernel: Kernel, name: str) -> Iterator[Timed]:
        for layer in self.shapes():
            for m in self.ms:
                yield self.layer(kernel, name, layer, m)

    def layer(self, kernel: Kernel, name: str, layer: Layer, m: int) -> Timed:
        """The task that times one layer."""
        return self._timed(name, m, (layer,), (kernel.id,), self.timers)

    def block(
        self, workload: Workload, kernels: Sequence[str], name: str, m: int, called: str
    ) -> Timed:
        """The task that times a decoder block, in a graph where there are any."""
        one = self._timed(name, m, workload.layers, tuple(kernels), self.timers[-1:])
        longest = self.budget.longest_call_s
        if longest is not None:  # each layer kept it
            longest *= len(workload.layers)
        budget = dataclasses.replace(self.budget, longest_call_s=longest)
        return dataclasses.replace(one, name=called, budget=budget)

    def _timed(
        self,
        name: str,
        m: int,
        layers: tuple[Layer, ...],
        kernels: tuple[str, ...],
        timers: tuple[Timer, ...],
    ) -> Timed:
        return Timed(
            site=self.site,
            workload=self.workload.name,
            format=name,
            layers=layers,
            kernels=kernels,
            m=m,
            dtype=self.dtype,
            timers=timers,
            budget=self.budget,
        )


def default_tokens(device: Device) -> tuple[tuple[int, Dtype], ...]:
    """m and dtypes of the correctness part: on a CPU fp32, on a GPU fp16 and some bf16."""
    if device.kind == "cpu":
        return tuple((m, "float32") for m in MS)
    half: list[tuple[int, Dtype]] = [(m, "float16") for m in MS]
    return (*half, *((m, "bfloat16") for m in _BFLOAT16_MS))


def measured_bandwidth(device: Device) -> Bandwidth:
    """The device's bandwidth, from a process of its own: also the sign that it works at all.

    Raises BackendError with the reason where it doesn't.
    """
    with Pool(1, 60.0) as pool:
        (outcome,) = pool.run([Task(measure_bandwidth, (device,))])
    if outcome.status != "done":
        raise BackendError(f"{device.name}: a plain read of memory fails: {outcome.reason}")
    bandwidth: Bandwidth = outcome.value
    return bandwidth


def correctness(
    plan: Plan, file: RecordFile, until: float, progress: Progress = lambda _: None
) -> Iterator[Record]:
    """Yield the record of each kernel, case, m and dtype; `until`, on `time.monotonic`.

    A task that is lost is run again one m at a time, so that it takes no other case with it. What
    will be timed is compiled beside, for the compilers' caches on disk; what fails there fails
    again when it is timed, and is told then.
    """
    lost: list[Conformance] = []
    with Pool(plan.jobs, _CONFORM_S) as pool:
        for outcome in pool.run(plan.parallel(), until):
            (task,) = outcome.task.arguments
            if isinstance(task, Conformance):
                progress(f"{task.kernel} {task.case}")
                if outcome.status in ("raised", "died", "timeout") and len(task.tokens) > 1:
                    lost += [dataclasses.replace(task, tokens=(one,)) for one in task.tokens]
                else:
                    yield from _written(file, _results(outcome, task.cases()))
        for outcome in pool.run((Task(conform, (task,)) for task in lost), until):
            (task,) = outcome.task.arguments
            progress(f"{task.kernel} {task.case}, again")
            yield from _written(file, _results(outcome, task.cases()))


def timing(
    plan: Plan,
    bandwidth: Bandwidth,
    file: RecordFile,
    until: float,
    progress: Progress = lambda _: None,
) -> Iterator[Record]:
    """Yield the record of each kernel, format, m and layer by each timer, and of the blocks."""
    with Pool(1, _MEASURE_S) as pool:
        for m in plan.ms:
            for name in plan.formats:
                yield from _Group(plan, bandwidth, file, pool, until, progress, name, m).run()


@dataclasses.dataclass(frozen=True)
class _Group:
    """The timing of one format at one m: layers of all kernels, then their blocks."""

    plan: Plan
    bandwidth: Bandwidth
    file: RecordFile
    pool: Pool
    until: float
    progress: Progress
    name: str
    m: int
    # by kernel and shape, by the last of the timers
    layers: dict[tuple[str, tuple[int, ...]], Measurement] = dataclasses.field(default_factory=dict)

    def run(self) -> Iterator[Record]:
        plan = self.plan
        for layer in plan.shapes():
            for kernel in plan.timed:
                results = self._layer(kernel, layer)
                self.layers[kernel.id, layer.shape] = results[-1][1]
                yield from _written(self.file, results)
        for kernel in plan.timed:
            ids = [kernel.id] * len(plan.workload.layers)
            yield from _written(self.file, self._block(plan.workload, ids, kernel.id))
        yield from _written(self.file, self._best(plan.workload, BEST))
        if self.plan.workload.together and self.m <= _LAUNCH_BOUND_M:
            yield from self._fused(plan.workload.fused())

    def _fused(self, workload: Workload) -> Iterator[Record]:
        """Fused layers, then the block of the fastest; none where the format can't be fused."""
        wholes = [layer for layer in workload.layers if layer.parts]
        try:
            for layer in wholes:
                layer.spec(self.name)
        except UnsupportedError as error:
            self.progress(f"{self.name}: not fused: {error}")
            return
        for layer in wholes:
            for kernel in self._fastest(layer):
                results = self._measured(self.plan.layer(kernel, self.name, layer, self.m))
                self.layers[kernel.id, layer.shape] = results[-1][1]
                yield from _written(self.file, results)
        yield from _written(self.file, self._best(workload, FUSED))

    def _fastest(self, layer: Layer) -> list[Kernel]:
        """Our own kernels that took every part of a fused layer, the few fastest of them."""
        sums: dict[str, float] = {}
        for kernel in self._own():
            parts = [self.layers[kernel.id, part.shape] for part in layer.parts]
            if all(part.status == "ok" for part in parts):
                sums[kernel.id] = sum(part.median_s for part in parts)
        chosen = sorted(sums, key=lambda kernel: sums[kernel])[:_FUSED_CANDIDATES]
        return [kernel for kernel in self.plan.timed if kernel.id in chosen]

    def _own(self) -> list[Kernel]:
        return [k for k in self.plan.timed if k.reads != "dense" and k.id not in peers()]

    def _layer(self, kernel: Kernel, layer: Layer) -> list[Result]:
        task = self.plan.layer(kernel, self.name, layer, self.m)
        for (other, shape), before in self.layers.items():
            # shapes grow: what was right but too slow to be timed stays so
            if other == kernel.id and before.status == "constraint" and before.correctness:
                n, k = shape
                reason = f"not tried: {n}x{k}, a smaller layer, is {before.reason}"
                return _all_alike(task, "constraint", reason)
        return self._measured(task)

    def _block(self, workload: Workload, kernels: Sequence[str], called: str) -> list[Result]:
        task = self.plan.block(workload, kernels, self.name, self.m, called)
        for layer, kernel in zip(task.layers, kernels, strict=True):
            alone = self.layers[kernel, layer.shape]
            if alone.status != "ok":
                return _all_alike(task, alone.status, f"{layer.name}: {alone.reason}")
        return self._measured(task)

    def _best(self, workload: Workload, called: str) -> list[Result]:
        """The block of the fastest of our own kernels; none where a layer has none."""
        chosen = []
        for layer in workload.layers:
            found = {k.id: self.layers.get((k.id, layer.shape)) for k in self._own()}
            times = {
                kernel: one.median_s for kernel, one in found.items() if one and one.status == "ok"
            }
            if not times:
                return []
            chosen.append(min(times, key=lambda kernel: times[kernel]))
        return self._block(workload, chosen, called)

    def _measured(self, task: Timed) -> list[Result]:
        task = dataclasses.replace(task, bandwidth=self.bandwidth)
        self.progress(
            f"{task.format} m={task.m} {task.case().layer}: {task.name or task.kernels[0]}"
        )
        (outcome,) = self.pool.run([Task(measure, (task,))], self.until)
        return _results(outcome, [task.case()] * len(task.timers))


_LOST: dict[str, Status] = {
    "raised": "runtime",
    "died": "runtime",
    "timeout": "timeout",
    "unstarted": "timeout",
}


def _results(outcome: Outcome, cases: Sequence[Case]) -> list[Result]:
    """What a task found, or the reason why it found nothing, for each of its cases."""
    if outcome.status == "done":
        results: list[Result] = outcome.value
        return results
    reason = f"not run: {outcome.reason}" if outcome.status == "unstarted" else outcome.reason
    lost = Measurement(status=_LOST[outcome.status], reason=reason)
    return [(case, lost, {}) for case in cases]


def _all_alike(task: Timed, status: Status, reason: str) -> list[Result]:
    return [(task.case(), Measurement(status=status, reason=reason), {})] * len(task.timers)


def _written(file: RecordFile, results: Sequence[Result]) -> Iterator[Record]:
    for case, measured, state in results:
        yield file.write(case, measured, state)
