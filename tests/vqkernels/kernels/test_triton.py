"""Triton kernels in the interpreter, against the oracle: right or not, never how fast.

The core runs each kernel on each format at one m, in fp16; the sweep adds every code layout and
load width of every format, other m, bf16 and fp32, and a damaged weight of every format.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.interpreter import DEVICE, interpreted_kernels
from vqkernels import oracle
from vqkernels.kernel import Kernel, Packed
from vqkernels.kernels.layout import LAYOUTS
from vqkernels.presets import PRESETS
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config, Value
from vqkernels.tensor import random_tensor
from vqkernels.testing import Case, check_case, conformance_cases, prepare

pytest.importorskip("triton", reason="Triton is not installed")


def ragged(case: Case) -> Case:
    """n that no tile divides, over several of most; more than one codebook where there are groups.

    The interpreter takes as long as there are programs and steps, so no more than that.
    """
    return dataclasses.replace(case.small(), n=19)


KERNELS = [*interpreted_kernels().values()]
CASES = [ragged(case) for case in conformance_cases()]

by_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def check(kernel: Kernel, case: Case, m: int, dtype: Dtype, config: Config | None = None) -> bool:
    return check_case(kernel, DEVICE, case, m, dtype=dtype, config=config, place="cpu")


def test_every_family_is_there() -> None:
    names = {kernel.name for kernel in KERNELS}
    assert names == {"naive", "staged", "vectorized", "fused_rq", "mma", "dequant"}


@by_kernel
@by_case
def test_every_format(case: Case, kernel: Kernel) -> None:
    check(kernel, case, 3, "float16")


@by_case
def test_every_format_has_a_kernel_for_few_and_for_many_tokens(case: Case) -> None:
    spec = case.spec
    tiled = spec.vector_length in (4, 8, 16, 32)  # Triton's tiles are powers of two
    tiled = tiled and spec.vector_width == 1
    for m in (1, 64):
        problem = Problem(m=m, n=case.n, k=case.k, spec=case.spec, dtype="float16")
        assert any(kernel.supports(problem, DEVICE) is None for kernel in KERNELS) == tiled


def variants(kernel: Kernel) -> list[dict[str, Value]]:
    """Each way in which a kernel reads codes, as changes to its default."""
    values = {param.name: param.values for param in kernel.space.params}
    if kernel.name != "vectorized":
        return [{"layout": layout} for layout in values["layout"]]
    # a tile of loads for every thread of two warps, the fewest that a program has
    return [
        {"layout": layout, "load_bytes": load, "tile_rows": 16, "tile_cells": 4 * load, "warps": 2}
        for layout in values["layout"]
        for load in values["load_bytes"]
        if isinstance(load, int)
    ]


def varied(kernel: Kernel, problem: Problem, change: dict[str, Value]) -> Config:
    return kernel.default(problem, DEVICE).replace(**change)


def problem_of(case: Case, m: int, dtype: Dtype) -> Problem:
    return Problem(m=m, n=case.n, k=case.k, spec=case.spec, dtype=dtype, bias=case.bias)


def test_variants_are_all_there_are() -> None:
    found = {
        k.name: [tuple(v.values())[: 1 + ("load_bytes" in v)] for v in variants(k)] for k in KERNELS
    }
    layouts = [(layout,) for layout in LAYOUTS]
    assert found == {
        "naive": [("cells",)],
        "vectorized": [("words", 4), ("words", 8), ("words", 16)],
        **dict.fromkeys(("staged", "fused_rq", "mma", "dequant"), layouts),
    }


@pytest.mark.sweep
@by_kernel
@by_case
def test_every_format_in_every_layout(case: Case, kernel: Kernel) -> None:
    """Layouts and load widths beside m and dtypes; m fills no token tile, and one of it two."""
    many = 17 if kernel.name in ("mma", "dequant") else 5
    settings: list[tuple[int, Dtype]] = [(many, "float16"), (1, "bfloat16"), (2, "float32")]
    changes = variants(kernel)
    for turn in range(max(len(settings), len(changes))):
        m, dtype = settings[turn % len(settings)]
        if kernel.name == "mma" and dtype == "float32":  # which it refuses
            m, dtype = 2, "bfloat16"
        problem = problem_of(case, m, dtype)
        if kernel.supports(problem, DEVICE) is None:
            config = varied(kernel, problem, changes[turn % len(changes)])
            assert check(kernel, case, m, dtype, config)


LAYOUT_CASES = [
    case
    for case in CASES
    if case.name in ("rq-2x256x8", "mixed-stages", "vptq-65536-256", "out-stride", "pq-m8")
]


@by_kernel
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_every_code_layout(case: Case, kernel: Kernel) -> None:
    problem = problem_of(case, 2, "float16")
    if kernel.supports(problem, DEVICE) is None:
        for change in variants(kernel):
            assert check(kernel, case, 2, "float16", varied(kernel, problem, change))


@pytest.mark.parametrize("stage_sum", ["registers", "dots"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_sums_stages_either_way(stage_sum: str, dtype: Dtype) -> None:
    kernel = interpreted_kernels()["triton/mma"]
    case = next(case for case in CASES if case.name == "rq-4x256x8")
    problem = Problem(m=5, n=case.n, k=case.k, spec=case.spec, dtype=dtype)
    config = kernel.default(problem, DEVICE).replace(stage_sum=stage_sum, splits=2)
    assert check(kernel, case, 5, dtype, config)


@pytest.mark.parametrize("name", ["mma", "dequant"])
@pytest.mark.parametrize("preset", ["rq-2x256x8", "toy-16-4"])
def test_large_tiles_end_within_the_matrix(name: str, preset: str) -> None:
    """Several tiles a side, in outputs, tokens and k; none of them is whole at the end."""
    kernel = interpreted_kernels()[f"triton/{name}"]
    case = Case(preset, PRESETS[preset], n=150, k=101)
    assert check(kernel, case, 70, "float16")


@pytest.mark.parametrize("splits", [2, 4, 16])
def test_splitting_k_is_deterministic_and_right(splits: int) -> None:
    kernel = interpreted_kernels()["triton/fused_rq"]
    tensor = random_tensor(PRESETS["rq-2x256x8"], 19, 1000, fit=False)
    problem = Problem(m=2, n=19, k=1000, spec=tensor.spec, dtype="float16")
    config = kernel.default(problem, DEVICE).replace(splits=splits, tile_cells=16)
    run, packed = prepare(kernel, problem, DEVICE, tensor, config)
    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).half()
    first, again = (torch.full((2, 19), float("nan"), dtype=torch.float16) for _ in range(2))
    run(packed, x, first)
    run(packed, x, again)
    assert torch.equal(first, again)
    assert oracle.check(first, oracle.reference(tensor, x)).passed


def broken(packed: Packed, how: str) -> Packed:
    arrays = dict(packed.arrays)
    if how == "swapped codebook":
        arrays["books"] = arrays["books"].roll(1, dims=1)
    if how == "off-by-one code":
        arrays["codes"] = arrays["codes"].clone()
        arrays["codes"].view(-1)[0] ^= 1
    return Packed(arrays)


def passes(kernel: Kernel, case: Case, m: int, how: str) -> bool:
    """Whether the check passes what a kernel computes from a weight that is broken so."""
    problem = problem_of(case, m, "float16")
    run, packed = prepare(kernel, problem, DEVICE, case.tensor)
    x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(0)).half()
    out = torch.full((m, case.n), float("nan"), dtype=torch.float16)
    run(broken(packed, how), x, out)
    rounded = kernel.rounds_to(problem)
    return oracle.check(out, oracle.reference(case.tensor, x), weights=rounded).passed


@by_kernel
@pytest.mark.parametrize("how", ["swapped codebook", "off-by-one code", "nothing"])
def test_a_damaged_weight_is_caught(kernel: Kernel, how: str) -> None:
    """The check is able to fail: what a kernel computes from a damaged weight doesn't pass."""
    case = next(case for case in CASES if case.name == "rq-2x256x8")
    assert passes(kernel, case, 3, how) == (how == "nothing")


@pytest.mark.sweep
@by_kernel
@by_case
def test_a_damaged_weight_of_any_format_is_caught(case: Case, kernel: Kernel) -> None:
    if kernel.supports(problem_of(case, 1, "float16"), DEVICE) is None:
        assert not passes(kernel, case, 1, "off-by-one code")


@by_kernel
def test_a_bad_token_stays_alone(kernel: Kernel) -> None:
    tensor = random_tensor(PRESETS["rq-2x256x8"], 37, 96, fit=False)
    problem = Problem(m=3, n=37, k=96, spec=tensor.spec, dtype="float16")
    run, packed = prepare(kernel, problem, DEVICE, tensor)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).half()
    x[1, 7] = float("nan")
    out = torch.zeros(3, 37, dtype=torch.float16)
    run(packed, x, out)
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, 2]]).all()


@by_kernel
def test_defaults_are_valid_configs(kernel: Kernel) -> None:
    for m, n, k in itertools.product((1, 3, 300), (5, 384, 11008), (384, 4096)):
        for name in ("rq-2x256x8", "vptq-65536-256", "vq-256x32"):
            problem = Problem(m=m, n=n, k=k, spec=PRESETS[name], dtype="float16")
            if kernel.supports(problem, DEVICE) is None:
                kernel.space.check(kernel.default(problem, DEVICE))


@by_kernel
def test_a_cpu_is_refused(kernel: Kernel) -> None:
    from vqkernels.device import detect_cpu

    problem = Problem(m=1, n=64, k=64, spec=PRESETS["rq-2x256x8"], dtype="float16")
    assert "GPU" in (kernel.supports(problem, detect_cpu()) or "")
