"""What a launch of a CUDA kernel costs in Python: all but the driver's own call, a fake here.

    pytest tests/benchmarks/test_launch.py --benchmark-only

`launch` fills the struct and calls; `run` adds what surrounds a kernel; `operator` adds the checks
of vq_linear, the choice of kernel and config, and the packed weight, from the cache each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.vqkernels.kernels.cuda.fake_driver import GPU, OK, FakeDriver, installed
from vqkernels import dispatch
from vqkernels.kernel import registry
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.tensor import random_tensor

SPEC = PRESETS["rq-2x256x8"]
SIDE = 256


class QuietDriver(FakeDriver):
    """Keeps nothing: what is timed is the caller."""

    def cuLaunchKernelEx(self, *_: Any) -> Any:  # noqa: N802
        return (OK,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    yield from installed(monkeypatch, QuietDriver())


@pytest.fixture
def calls(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], object]]:
    kernel = registry()["cuda/fused_rq"]
    problem = Problem(m=1, n=SIDE, k=SIDE, spec=SPEC)
    config = kernel.default(problem, GPU).replace(splits=1)
    tensor = random_tensor(SPEC, SIDE, SIDE, fit=False)
    packed = kernel.pack(tensor, config, problem)
    run = kernel.compile(config, problem, GPU)
    (program,) = kernel.programs(config, problem)
    launcher = Launcher(program, GPU)
    x, out = torch.randn(1, SIDE), torch.empty(1, SIDE)
    given = {"x": x, "codes": packed["codes"], "books": packed["books"], "out": out}
    # tensors are the CPU's, and everything else is as on a GPU
    choice = dispatch.Choice(kernel, config, "the benchmark's")
    monkeypatch.setattr(dispatch, "_device", lambda *_: GPU)
    monkeypatch.setattr(dispatch, "select", lambda *_: choice)
    dispatch._plan.cache_clear()
    parts, text = list(tensor.parts.values()), dispatch.spec_text(SPEC)
    operator = dispatch._product._init_fn
    return {
        "launch": lambda: launcher(given),
        "run": lambda: run(packed, x, out),
        "operator": lambda: operator(x, parts, text, SIDE, SIDE),
    }


@pytest.fixture(autouse=True)
def forget_plans() -> Iterator[None]:
    yield
    dispatch._plan.cache_clear()


@pytest.mark.parametrize("name", ["launch", "run", "operator"])
@pytest.mark.benchmark(group="Python side of a launch")
def test_launch(benchmark, calls, name) -> None:
    benchmark.pedantic(calls[name], rounds=200, iterations=200, warmup_rounds=20)
