"""The table kernel beside torch's fp32 product and AQLM's numba kernel: 4096 x 4096, m = 1.

    pytest tests/benchmarks --benchmark-only

Each implementation goes round enough copies of its weight to exceed twice the last-level cache, so
weights come from memory, as in a model. pytest-benchmark prints each group's ratios to its
fastest member; compare within a group, which is one run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numba
import pytest
import torch

from autotune.timers import cold_copies, pinned_threads
from bench.peers import peers
from vqkernels import oracle
from vqkernels.device import detect_cpu
from vqkernels.kernel import registry
from vqkernels.kernels.numba import threads
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.tensor import QuantizedTensor, random_tensor

N = K = 4096
SPEC = PRESETS["aqlm-2x8"]
ROUNDS = 200

Call = Callable[[], torch.Tensor]


@pytest.fixture(scope="module")
def tensor() -> QuantizedTensor:
    return random_tensor(SPEC, N, K)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(1, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[int]:
    """The pool held to as many threads as the test asks for, each on its own core."""
    before = torch.get_num_threads()
    threads.limit(request.param)
    with pinned_threads():
        yield request.param
    threads.limit(before)


def kernel_call(name: str, tensor: QuantizedTensor, x: torch.Tensor, count: int) -> Call:
    device = detect_cpu(count)
    kernel = peers()[name] if name in peers() else registry()[name]
    problem = Problem(m=1, n=N, k=K, spec=SPEC)
    assert kernel.supports(problem, device) is None
    config = kernel.default(problem, device)
    run, packed = kernel.compile(config, problem, device), kernel.pack(tensor, config, problem)
    copies = itertools.cycle([packed.clone() for _ in range(cold_copies(packed.nbytes, device))])
    out = torch.empty(1, N)

    def call() -> torch.Tensor:
        run(next(copies), x, out)
        return out

    return call


def linear_call(tensor: QuantizedTensor, x: torch.Tensor) -> Call:
    weight = tensor.decode(torch.float32)
    copies = itertools.cycle(
        [weight.clone() for _ in range(cold_copies(weight.numel() * 4, detect_cpu()))]
    )
    return lambda: torch.nn.functional.linear(x, next(copies))


def measure(benchmark, call: Call, tensor: QuantizedTensor, x: torch.Tensor) -> None:
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=30)
    assert oracle.check(call(), oracle.reference(tensor, x)).passed
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "cpu": detect_cpu().name}


@pytest.mark.parametrize("limited", [2], indirect=True)
@pytest.mark.parametrize("name", ["numba/table", "torch/linear"])
@pytest.mark.benchmark(group="aqlm-2x8 4096x4096 m=1, 2 threads")
def test_two_threads(benchmark, limited, name, tensor, x) -> None:
    call = linear_call(tensor, x) if name == "torch/linear" else kernel_call(name, tensor, x, 2)
    measure(benchmark, call, tensor, x)


@pytest.mark.parametrize("limited", [1], indirect=True)
@pytest.mark.parametrize("name", ["numba/table", "aqlm/numba"])
@pytest.mark.benchmark(group="aqlm-2x8 4096x4096 m=1, 1 thread")
def test_one_thread(benchmark, limited, name, tensor, x) -> None:
    assert numba.get_num_threads() == 1, "AQLM's kernel is right on one thread only"
    measure(benchmark, kernel_call(name, tensor, x, 1), tensor, x)


@pytest.mark.parametrize("limited", [2], indirect=True)
@pytest.mark.benchmark(group="table right after a torch region, 2 threads")
def test_right_after_torch(benchmark, limited, tensor, x) -> None:
    """Two pools would spin against each other here: see vqkernels.kernels.numba.threads."""
    call, square = kernel_call("numba/table", tensor, x, 2), torch.randn(512, 512)

    def torch_region() -> None:
        square @ square

    benchmark.pedantic(call, setup=torch_region, rounds=ROUNDS, warmup_rounds=30)
