"""Inputs that break kernels: extreme codes and values, odd memory, NaN, every config, threads."""

from __future__ import annotations

import itertools

import pytest
import torch

from vqkernels import oracle
from vqkernels.device import detect_cpu
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.testing import prepare

CPU = detect_cpu()
KERNELS = [k for k in registry().kernels.values() if k.backend in ("numba", "torch")]
NUMBA = [kernel for kernel in KERNELS if kernel.backend == "numba"]
SPEC = PRESETS["rq-2x256x8"]
N, K = 269, 896

by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)


def product(kernel: Kernel, tensor: QuantizedTensor, x: torch.Tensor, out=None) -> torch.Tensor:
    problem = Problem(m=x.shape[0], n=tensor.n, k=tensor.k, spec=tensor.spec)
    run, packed = prepare(kernel, problem, CPU, tensor)
    if out is None:
        out = torch.full((x.shape[0], tensor.n), float("nan"))
    run(packed, x, out)
    return out


def right(kernel: Kernel, tensor: QuantizedTensor, x: torch.Tensor, out: torch.Tensor) -> bool:
    rounded = "float32" if kernel.rounds_weights else None
    return oracle.check(out, oracle.reference(tensor, x), weights=rounded).passed


def tokens(m: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed))


@by_kernel
@pytest.mark.parametrize("code", [0, 255, 17])
def test_one_code_everywhere(kernel: Kernel, code: int) -> None:
    tensor = random_tensor(SPEC, N, K)
    tensor = tensor.replace_parts(codes=torch.full_like(tensor.parts["codes"], code))
    x = tokens()
    assert right(kernel, tensor, x, product(kernel, tensor, x))


@by_kernel
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 6e4, 1e30])
def test_extreme_activations(kernel: Kernel, scale: float) -> None:
    tensor = random_tensor(SPEC, N, K)
    x = tokens() * scale
    assert right(kernel, tensor, x, product(kernel, tensor, x))


@by_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_stays_alone(kernel: Kernel, bad: float) -> None:
    tensor = random_tensor(SPEC, N, K)
    x = tokens(m=5)
    x[2, 5] = bad
    out = product(kernel, tensor, x)
    assert not torch.isfinite(out[2]).any()
    others = [0, 1, 3, 4]
    assert right(kernel, tensor, x[others], out[others])


@by_kernel
def test_tokens_of_very_different_size(kernel: Kernel) -> None:
    tensor = random_tensor(SPEC, N, K)
    x = tokens(m=4) * torch.tensor([1e-6, 1.0, 6e4, 1e-3])[:, None]
    assert right(kernel, tensor, x, product(kernel, tensor, x))


@by_kernel
def test_strided_and_misaligned_memory(kernel: Kernel) -> None:
    tensor = random_tensor(SPEC, N, K)
    storage = torch.randn(3 * 2 * K + 1, generator=torch.Generator().manual_seed(3))
    x = storage[1:].view(3, 2 * K)[:, ::2]  # every other element, off by 4 bytes
    assert not x.is_contiguous()
    wide = torch.full((3, 2 * N + 1), float("nan"))
    out = wide[:, 1 : 2 * N + 1 : 2]
    product(kernel, tensor, x, out)
    assert right(kernel, tensor, x, out)
    assert torch.isnan(wide[:, 0::2]).all(), "wrote between the elements of a strided out"


@pytest.mark.parametrize("kernel", NUMBA, ids=lambda kernel: kernel.id)
def test_repeated_two_thread_calls_are_bitwise_equal(kernel: Kernel) -> None:
    from vqkernels.kernels.numba import threads

    tensor = random_tensor(SPEC, 1031, K)
    problem = Problem(m=2, n=tensor.n, k=K, spec=SPEC)
    run, packed = prepare(kernel, problem, CPU, tensor)
    x, out = tokens(m=2), torch.empty(2, tensor.n)
    before = torch.get_num_threads()
    try:
        threads.limit(1)
        run(packed, x, out)
        first = out.clone()
        threads.limit(2)
        for _ in range(300):
            out.fill_(float("nan"))
            run(packed, x, out)
            # the BLAS inside dequant may split its work by thread: equal among two-thread calls
            if kernel.name == "dequant" and _ == 0:
                first = out.clone()
            assert torch.equal(out, first)
    finally:
        threads.limit(before)


def configs(kernel: Kernel) -> list[Config]:
    names = [param.name for param in kernel.space.params]
    values = itertools.product(*(param.values for param in kernel.space.params))
    every = [Config(**dict(zip(names, chosen, strict=True))) for chosen in values]
    return [config for config in every if kernel.space.broken(config) is None]


@pytest.mark.parametrize("kernel", NUMBA, ids=lambda kernel: kernel.id)
def test_every_config_is_right(kernel: Kernel) -> None:
    tensor = random_tensor(SPEC, N, K)
    x = tokens(m=9)
    expected = oracle.reference(tensor, x)
    problem = Problem(m=9, n=N, k=K, spec=SPEC)
    for config in configs(kernel):
        packed = kernel.pack(tensor, config, problem)
        declared = kernel.footprint(config, problem, CPU)
        assert packed.nbytes <= declared.weight_bytes
        out = torch.full((9, N), float("nan"))
        kernel.compile(config, problem, CPU)(packed, x, out)
        assert oracle.check(out, expected).passed, config


@by_kernel
def test_the_default_is_a_valid_config(kernel: Kernel) -> None:
    for m, n, k in itertools.product((1, 3, 300), (5, 384, 11008), (384, 4096)):
        problem = Problem(m=m, n=n, k=k, spec=SPEC)
        if kernel.supports(problem, CPU) is None:
            kernel.space.check(kernel.default(problem, CPU))
