"""Every kernel, on every format, against the float64 oracle.

The core runs presets at two m that between them compile the widest and the narrowest loop of each
kernel (17 tokens are two passes of 8 and one of 1), and each field of a spec at one; the sweep
runs the rest. A kernel compiles in one to two seconds, which is what these tests spend.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import quantized_tensors
from vqkernels import oracle
from vqkernels.device import detect_cpu
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.testing import (
    Case,
    check_case,
    conformance_cases,
    field_cases,
    prepare,
    preset_cases,
)

KERNELS = [k for k in registry().kernels.values() if k.backend in ("numba", "torch")]
CASES = conformance_cases()
CPU = detect_cpu()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("case", preset_cases(), ids=str)
def test_every_preset_is_right_or_refused(case: Case, kernel: Kernel) -> None:
    for m in (1, 17):
        check_case(kernel, CPU, case, m)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("case", field_cases(), ids=str)
def test_every_field_is_right_or_refused(case: Case, kernel: Kernel) -> None:
    check_case(kernel, CPU, case, 1)


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("case", preset_cases(), ids=str)
def test_every_preset_at_other_m(case: Case, kernel: Kernel) -> None:
    for m in (2, 3, 8, 64):
        check_case(kernel, CPU, case, m)


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("case", field_cases(), ids=str)
def test_every_field_in_several_passes(case: Case, kernel: Kernel) -> None:
    check_case(kernel, CPU, case, 17)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_format_has_a_codes_kernel(case: Case) -> None:
    problem = Problem(m=1, n=case.n, k=case.k, spec=case.spec, bias=case.bias)
    numba = [kernel for kernel in KERNELS if kernel.backend == "numba"]
    assert [kernel.name for kernel in numba if kernel.supports(problem, CPU) is None]


@pytest.mark.parametrize("name", ["numba/naive", "torch/dequant", "torch/dense"])
@settings(max_examples=40)
@given(tensor=quantized_tensors(), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_random_formats_without_compiling(name, tensor, m, seed) -> None:
    _hold(registry()[name], tensor, m, seed)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["numba/vectorized", "numba/dequant", "numba/table"])
@settings(max_examples=12)  # each compiles a loop or two of its own
@given(tensor=quantized_tensors(), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_random_formats(name, tensor, m, seed) -> None:
    _hold(registry()[name], tensor, m, seed)


def _hold(kernel, tensor, m, seed) -> None:
    problem = Problem(m=m, n=tensor.n, k=tensor.k, spec=tensor.spec, bias=tensor.bias is not None)
    if kernel.supports(problem, CPU):
        return
    x = torch.randn(m, tensor.k, generator=torch.Generator().manual_seed(seed))
    run, packed = prepare(kernel, problem, CPU, tensor)
    out = torch.full((m, tensor.n), float("nan"))
    run(packed, x, out)
    rounded = "float32" if kernel.rounds_weights else None
    assert oracle.check(out, oracle.reference(tensor, x), weights=rounded).passed


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_other_dtypes_are_refused_with_a_sentence(kernel: Kernel) -> None:
    problem = Problem(m=1, n=64, k=64, spec=PRESETS["rq-2x256x8"], dtype="float16")
    assert "float16" in (kernel.supports(problem, CPU) or "")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_a_gpu_is_refused_by_cpu_kernels(kernel: Kernel) -> None:
    gpu = dataclasses.replace(CPU, kind="cuda", name="H100", arch="sm_90")
    problem = Problem(m=1, n=64, k=64, spec=PRESETS["rq-2x256x8"])
    reason = kernel.supports(problem, gpu)
    assert (reason is None) == (kernel.backend == "torch"), reason
