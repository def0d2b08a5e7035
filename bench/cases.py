"""Single cases of a selection, measured one by one in whatever order they are asked for.

`bench.run` goes through a selection and writes records; a test runner picks its cases itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from autotune.bandwidth import Bandwidth, measure_bandwidth
from autotune.evaluate import check, evaluate
from autotune.measurement import Measurement
from autotune.timers import Budget, set_threads
from bench.environment import describe_host, device_state
from bench.run import Plan, Product, case_of, make_or_refuse, make_product
from bench.selection import Selection, matching_kernels
from bench.validity import changed
from bench.weights import Weight
from bench.workload import Layer, Workload
from vqkernels.device import Device
from vqkernels.kernel import Kernel

__all__ = ["Chosen", "Session", "differences"]


class Chosen(str):
    """A case that may be measured, as its id: a string, so that it can stand in a test's JSON.

    All that decides what is measured is in the id, and nothing else (no hash, no time, no
    device), so that a later run has the same.
    """

    workload: Workload
    layer: Layer
    format_name: str
    m: int
    kernel: Kernel
    group: str

    @classmethod
    def make(
        cls, plan: Plan, workload: Workload, layer: Layer, name: str, m: int, kernel: Kernel
    ) -> Chosen:
        """The case of a kernel on a layer in the format called `name`, as `plan` measures it."""
        words = [workload.name, layer.name, name, f"m{m}", plan.dtype]
        if not plan.cold:
            words.append("hot")
        chosen = cls("-".join([*words, kernel.id]))
        chosen.workload, chosen.layer, chosen.format_name = workload, layer, name
        chosen.m, chosen.kernel = m, kernel
        chosen.group = " ".join([*words[:2], f"{layer.n}x{layer.k}", *words[2:]])
        return chosen


class Session:
    """Measures cases on one device; `plan` says how, its selections and kernels are not read."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # of the last case: neighbours share the weight, mostly the product too
        self._weight: tuple[object, Weight | str] | None = None
        self._product: tuple[object, Product] | None = None

    @functools.cached_property
    def _bandwidth(self) -> Bandwidth:
        return measure_bandwidth(self.plan.device)

    @functools.cached_property
    def _host(self) -> dict[str, Any]:
        return describe_host(self.plan.device)

    def choose(self, selections: Sequence[Selection], patterns: Sequence[str]) -> list[Chosen]:
        """The cases of the selections, in the order of a run, each once. Raises SpecError."""
        kernels = matching_kernels(patterns, self.plan.device)
        cases = (
            Chosen.make(self.plan, workload, layer, name, m, kernel)
            for selection in selections
            for workload, layer, name in selection.cases()
            for m in selection.ms
            for kernel in kernels
        )
        return list(dict.fromkeys(cases))

    def measure(self, chosen: Chosen, budget: Budget | None) -> tuple[Measurement, dict[str, Any]]:
        """The measurement, and what a record has besides; checked, but not timed, without `budget`.

        Either way it is held to what serving asks for, so that it passes both or neither.
        """
        plan = self.plan
        with _threads(plan.device):
            product = self._make(chosen)
            before = device_state(plan.device)
            facts: dict[str, Any] = {}
            if isinstance(product.subject, str):
                measured = Measurement(status="constraint", reason=product.subject)
            elif budget is None:
                measured = check(chosen.kernel, product.subject)
            else:
                measured = evaluate(
                    chosen.kernel,
                    product.subject,
                    budget=budget,
                    bandwidth=self._bandwidth,
                    cold=plan.cold,
                    serves=True,
                )
                facts["bandwidth"] = dataclasses.asdict(self._bandwidth)
                facts["budget"] = dataclasses.asdict(budget)
            facts["state"] = {"before": before, "after": device_state(plan.device)}
        case = dataclasses.asdict(case_of(plan, product, chosen.kernel))
        return measured, {**self._host, **case, **facts, **measured.to_dict()}

    def forget(self) -> None:
        """Let go of the weight and the product, which may be a good part of a GPU's memory."""
        self._weight = self._product = None

    def _make(self, chosen: Chosen) -> Product:
        key = (chosen.workload, chosen.layer, chosen.format_name)
        if self._weight is None or self._weight[0] != key:
            self._weight = (key, make_or_refuse(*key, seed=self.plan.seed))
        whole = (*key, chosen.m)
        if self._product is None or self._product[0] != whole:
            self._product = (whole, make_product(self.plan, *whole, self._weight[1]))
        return self._product[1]


@contextlib.contextmanager
def _threads(device: Device) -> Iterator[None]:
    """As many as the device has, and afterwards as many as the process had."""
    if device.kind != "cpu":
        yield
        return
    before = torch.get_num_threads()
    set_threads(device.units)
    try:
        yield
    finally:
        set_threads(before)


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Why the times of two records of one case are no measure of each other; empty where they are.

    Given the records' fields as JSON has them.
    """
    here, there = _conditions(now), _conditions(then)
    unlike = [
        f"{name}: {there[name]} then, {here[name]} now"
        for name in here
        if here[name] != there[name]
    ]
    return unlike + list(changed([then.get("state", {}).get("after", {}), now["state"]["before"]]))


def _conditions(record: Mapping[str, Any]) -> dict[str, object]:
    device, timing = record.get("device") or {}, record.get("timing") or {}
    return {
        "device": f"{device.get('name')} ({device.get('arch')})",
        "timer": timing.get("timer"),
        "cache": timing.get("cache"),
        "threads": timing.get("threads"),
    }
