"""Running a selection: each layer and format once, each kernel on it, a record for every case."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autotune.bandwidth import Bandwidth
from autotune.evaluate import Subject, evaluate, make_subject
from autotune.measurement import Measurement
from autotune.timers import Budget
from bench.environment import describe_host, device_state
from bench.records import Case, RecordFile
from bench.selection import Selection
from bench.weights import Weight, make_weight
from bench.workload import Layer, Workload
from vqkernels.device import Device
from vqkernels.errors import BackendError, UnsupportedError
from vqkernels.kernel import Kernel
from vqkernels.parts import effective_bits
from vqkernels.problem import Problem

__all__ = [
    "Plan",
    "Product",
    "case_of",
    "describe",
    "failures",
    "header",
    "make_or_refuse",
    "make_product",
    "run_plan",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a run. `dtype` is of the activations."""

    selections: tuple[Selection, ...]
    kernels: tuple[Kernel, ...]
    device: Device
    dtype: str = "float32"
    seed: int = 0
    budget: Budget = dataclasses.field(default_factory=Budget)
    cold: bool = True

    def layers(self) -> list[tuple[Workload, Layer, str, tuple[int, ...]]]:
        """Each selected layer and format, with the m it is run at."""
        return [(*case, chosen.ms) for chosen in self.selections for case in chosen.cases()]

    @property
    def size(self) -> int:
        """Number of cases."""
        return sum(len(ms) for *_, ms in self.layers()) * len(self.kernels)


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer in a format at some m, as kernels meet it.

    weight, subject: what they are given and held to, or the sentence that says why there is none.
    """

    workload: Workload
    layer: Layer
    format: str
    m: int
    weight: Weight | str
    subject: Subject | str


def header(device: Device, bandwidth: Bandwidth, budget: Budget) -> dict[str, Any]:
    """Fields that every record of a run carries."""
    return {
        "argv": ["vqbench", *sys.argv[1:]],  # however it was started: paths are the machine's own
        **describe_host(device),
        "bandwidth": dataclasses.asdict(bandwidth),
        "budget": dataclasses.asdict(budget),
    }


def run_plan(
    plan: Plan,
    bandwidth: Bandwidth,
    file: RecordFile,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Yield each record once it is written; `progress` hears what comes next."""
    for workload, layer, name, ms in plan.layers():
        # a function of its own, so that a weight is let go before the next is made
        for product in _products(plan, workload, layer, name, ms, progress):
            for kernel in plan.kernels:
                progress(f"{workload.name} {layer.name} {name} m={product.m}: {kernel.id}")
                before = device_state(plan.device)
                measured = _measure(plan, kernel, product, bandwidth)
                state = {"before": before, "after": device_state(plan.device)}
                yield file.write(case_of(plan, product, kernel), measured, state)
            del product


def _products(
    plan: Plan,
    workload: Workload,
    layer: Layer,
    name: str,
    ms: Sequence[int],
    progress: Callable[[str], None],
) -> Iterator[Product]:
    progress(f"{workload.name} {layer.name} {name}: weights")
    weight = make_or_refuse(workload, layer, name, seed=plan.seed)
    for m in ms:
        if isinstance(weight, Weight):
            progress(f"{workload.name} {layer.name} {name} m={m}: reference")
        yield make_product(plan, workload, layer, name, m, weight)


def make_or_refuse(workload: Workload, layer: Layer, name: str, *, seed: int) -> Weight | str:
    """The layer's weight, or the sentence that says why there is none."""
    try:
        return make_weight(workload, layer, layer.part_spec(name), seed=seed)
    except (UnsupportedError, BackendError) as error:
        return str(error)


def make_product(
    plan: Plan, workload: Workload, layer: Layer, name: str, m: int, weight: Weight | str
) -> Product:
    """The product of `m` tokens with a weight of `make_or_refuse`'s; the oracle takes seconds."""
    subject: Subject | str
    if isinstance(weight, Weight):
        subject = make_subject(weight.tensor, m, plan.device, dtype=plan.dtype, seed=plan.seed)
    else:
        subject = weight
    return Product(workload, layer, name, m, weight, subject)


def case_of(plan: Plan, product: Product, kernel: Kernel) -> Case:
    """The case of a kernel in its default config on a product."""
    return describe(
        kernel,
        _problem(plan, product),
        plan.device,
        workload=product.workload.name,
        layer=product.layer.name,
        name=product.format,
        seed=plan.seed,
        weight=product.weight if isinstance(product.weight, Weight) else None,
        stands_for=product.layer.stands_for,
    )


def _problem(plan: Plan, product: Product) -> Problem:
    if isinstance(product.subject, Subject):
        return product.subject.problem
    layer, name = product.layer, product.format
    try:
        spec = layer.spec(name)
    except UnsupportedError:  # of a case without a weight, whose record says why
        spec = layer.part_spec(name)
    return Problem(m=product.m, n=layer.n, k=layer.k, spec=spec, dtype=plan.dtype)  # type: ignore[arg-type]  # click checked the choice


def _measure(plan: Plan, kernel: Kernel, product: Product, bandwidth: Bandwidth) -> Measurement:
    if isinstance(product.subject, str):
        return Measurement(status="constraint", reason=product.subject)
    return evaluate(
        kernel, product.subject, budget=plan.budget, bandwidth=bandwidth, cold=plan.cold
    )


def describe(
    kernel: Kernel,
    problem: Problem,
    device: Device,
    *,
    workload: str,
    layer: str,
    name: str,
    seed: int,
    weight: Weight | None,
    stands_for: int = 1,
) -> Case:
    """The case of a kernel in its default config on a layer in the format called `name`."""
    bits = effective_bits([(problem.spec, problem.n, problem.k)]).per_weight() if weight else None
    return Case(
        workload=workload,
        layer=layer,
        format=name,
        spec=problem.spec.to_dict(),
        n=problem.n,
        k=problem.k,
        m=problem.m,
        dtype=problem.dtype,
        kernel=kernel.id,
        kernel_source=kernel.source_hash,
        config=_config(kernel, problem, device),
        config_from="default",
        seed=seed,
        codes=weight.codes if weight else None,
        relative_error=weight.relative_error if weight else None,
        effective_bits=bits,
        stands_for=stands_for,
    )


def _config(kernel: Kernel, problem: Problem, device: Device) -> dict[str, Any]:
    try:
        return {} if kernel.supports(problem, device) else dict(kernel.default(problem, device))
    except Exception:  # `evaluate` has met it too: the record says what happened
        return {}


def failures(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that are neither right nor refused for a stated reason."""
    return [record for record in records if record["status"] not in ("ok", "checked", "constraint")]
