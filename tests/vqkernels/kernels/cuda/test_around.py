"""What surrounds a product: the two launches, held to torch's operations and to the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.cubin import read_cubin
from tests.cuda import harness
from vqkernels import oracle
from vqkernels.device import Device, detect_cpu
from vqkernels.kernel import Kernel, Packed, registry
from vqkernels.kernels import layout, linear
from vqkernels.kernels.cuda import around, product
from vqkernels.kernels.cuda.program import Program
from vqkernels.presets import PRESETS
from vqkernels.problem import Dtype, Problem
from vqkernels.testing import Case, conformance_cases, field_cases, prepare

GPU = dataclasses.replace(
    detect_cpu(), kind="cuda", name="harness", arch="sm_90", units=4, shared_bytes=227 << 10
)
NAIVE = registry()["cuda/naive"]
FIELDS = {case.name: case for case in field_cases()}
SMALL = {case.name: case.small() for case in conformance_cases()}
# What is the same on a GPU as on a CPU: memory that nobody has written, and other views of it.
ALLOWED = {"aten::empty.memory_format", "aten::view", "aten::detach", "aten::alias"}


def problem_of(case: Case, m: int, dtype: Dtype = "float16") -> Problem:
    return Problem(m=m, n=case.n, k=case.k, spec=case.spec, dtype=dtype, bias=case.bias)


def use(launcher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (around, product):
        monkeypatch.setattr(module, "Launcher", launcher)


class Operations(TorchDispatchMode):
    """The names of torch's operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def launched(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    *,
    kernel: Kernel = NAIVE,
    m: int = 3,
    **config: Any,
) -> list[Program]:
    """What a call launches, and no operation of torch beside it; nothing is run."""
    found: list[Program] = []

    def launcher(program: Program, _: Device) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: found.append(program)

    problem = problem_of(case, m)
    x, out = torch.ones(m, case.k).half(), torch.empty(m, case.n).half()
    with monkeypatch.context() as patched:
        use(launcher, patched)
        chosen = kernel.default(problem, GPU).replace(**config)
        run, packed = prepare(kernel, problem, GPU, case.tensor, chosen)
        with Operations() as operations:
            run(packed, x, out)
    assert operations.names <= ALLOWED, operations.names - ALLOWED
    return found


@pytest.mark.parametrize(
    ("case", "splits", "kernels"),
    [
        ("bias", 1, "naive"),
        ("bias", 2, "naive epilogue"),
        ("row-scale-and-zero", 1, "prologue naive epilogue"),
        ("column-scale-and-zero", 1, "prologue naive epilogue"),
        ("permuted", 1, "prologue naive"),
        ("rotated", 1, "prologue naive"),
        ("ragged-k", 1, "prologue naive"),
        ("stride", 1, "prologue naive"),
        ("side-columns", 1, "prologue naive epilogue"),
        ("out", 1, "naive"),
        ("out-stride", 1, "naive"),
        ("out-stride", 4, "naive epilogue"),
        ("everything-in", 1, "prologue naive epilogue"),
    ],
)
def test_no_launch_that_the_format_does_not_need(case, splits, kernels, monkeypatch) -> None:
    found = launched(FIELDS[case], monkeypatch, splits=splits)
    assert [program.kernel for program in found] == kernels.split()


@pytest.mark.parametrize(
    ("sums", "dtype", "needed"),
    [
        (None, "float16", False),
        (torch.float16, "float16", False),
        (torch.float32, "float32", False),
        (torch.float32, "float16", True),
    ],
)
def test_sums_of_another_dtype_are_rounded_after(sums, dtype, needed) -> None:
    problem = problem_of(Case("", PRESETS["rq-2x256x8"], 64, 64), 2, dtype)
    assert (around.epilogue(problem, GPU, 1, sums) is not None) is needed


def test_every_format_is_three_launches_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in conformance_cases():
        small = dataclasses.replace(case, n=min(case.n, 64))
        for splits in (1, 4):
            assert len(launched(small, monkeypatch, splits=splits)) <= 3, case


# ------------------------------------------------------------------------------------------------
# the same values as torch's operations


def both(
    case: Case, m: int, parts: int, dtype: Dtype, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """core_x and y of ours and of `linear.surround`, around a product that gives random sums."""
    use(harness.launcher(seed=seed, counting=False), monkeypatch)
    problem = problem_of(case, m, dtype)
    arrays = layout.arrays(case.tensor, "cells", problem)
    random = torch.Generator().manual_seed(7)
    _, width = linear.core_shape(case.spec, case.n, case.k)
    sums = torch.randn(parts, m, width, generator=random)
    x = torch.randn(m, case.k, generator=random).to(problem.torch_dtype)
    ours, theirs = [torch.empty(m, case.n, dtype=x.dtype) for _ in range(2)]
    seen: list[Tensor] = []

    def core(_: Packed, x: Tensor, y: Tensor) -> None:
        seen.append(x.clone())
        y.copy_(sums if y.dim() == 3 else sums.sum(0))

    run = around.surround(core, problem, GPU, parts=parts)
    run(Packed(arrays), x, ours)
    linear.surround(core, problem)(Packed(arrays), x, theirs)
    return [seen[0], ours], [seen[1], theirs]


def programs(case: Case, m: int, parts: int, dtype: Dtype) -> list[Program]:
    problem = problem_of(case, m, dtype)
    found = (
        around.prologue(problem, GPU),
        around.epilogue(problem, GPU, parts),
    )
    return [program for program in found if program is not None]


def test_values_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """m = 5 leaves a ragged tile of tokens, 37 outputs a ragged block, three spans a sum."""
    asked = [(case, 5, 1 + 2 * (i % 2)) for i, case in enumerate(SMALL.values())]
    harness.build_programs([one for ask in asked for one in programs(*ask, "float32")])
    for case, m, parts in asked:
        ours, theirs = both(case, m, parts, "float32", monkeypatch)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-5, msg=str(case))
        if not case.spec.rotation_size:
            assert torch.equal(ours[0], theirs[0]), f"{case}: x is only moved and scaled"


WHOLE = ("everything-in", "everything-out", "column-scale-and-zero", "rotated")


@pytest.mark.parametrize("name", WHOLE)
def test_every_order_of_threads_gives_the_same_bits(name: str, monkeypatch) -> None:
    found = [both(SMALL[name], 6, 2, "bfloat16", monkeypatch, seed)[0] for seed in harness.ORDERS]
    for core_x, y in found[1:]:
        assert torch.equal(core_x, found[0][0])
        assert torch.equal(y, found[0][1])


def test_a_wide_layer_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a prologue take several elements a thread, and share a sum over x."""
    spec = dataclasses.replace(PRESETS["toy-16-4"], zero_axis="row", scale_axis="column")
    case = Case("wide", spec, 261, 3001)
    (first, *_) = programs(case, 3, 1, "float32")
    assert 1 < first.grid[1] < case.k // first.threads
    ours, theirs = both(case, 3, 1, "float32", monkeypatch)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-6, atol=1e-4)


@pytest.mark.usefixtures("built")
def test_views_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL["everything-in"]
    use(harness.launcher(counting=False), monkeypatch)
    run, packed = prepare(NAIVE, problem_of(case, 2), GPU, case.tensor)
    x, out = torch.randn(2, case.k + 3).half()[:, 1:-2], torch.empty(2, case.n + 5).half()
    out.fill_(7)
    run(packed, x, out[:, 2:-3])
    assert oracle.check(out[:, 2:-3], oracle.reference(case.tensor, x), weights="float16").passed
    assert (out[:, :2] == 7).all()
    assert (out[:, -3:] == 7).all()


# ------------------------------------------------------------------------------------------------
# in the product's own store, and what must not pass


def own_store_cases() -> dict[str, Case]:
    scaled = dataclasses.replace(PRESETS["aqlm-2x8"], scale_axis="tensor")
    strided = dataclasses.replace(FIELDS["out-stride"].spec, scale_axis="row")
    return {
        "bias": SMALL["bias"],
        "row scale": SMALL["aqlm-2x8"],
        "tensor scale and bias": Case("", scaled, 19, 64, bias=True),
        "stride, padding, row scale and bias": Case("", strided, 31, 64, bias=True),
    }


@pytest.mark.parametrize("kernel", ["cuda/naive", "cuda/fused_rq"])
def test_the_products_own_store_gives_the_epilogues_bits(kernel, monkeypatch) -> None:
    one, cases = registry()[kernel], own_store_cases()

    def not_its_own(patched: pytest.MonkeyPatch) -> None:
        patched.setattr(around, "store", lambda problem, parts: {"FINAL": False})

    def results() -> list[Tensor]:
        outs = []
        for case in cases.values():
            problem = problem_of(case, 2)
            config = one.default(problem, GPU).replace(splits=1)
            run, packed = prepare(one, problem, GPU, case.tensor, config)
            x = torch.randn(2, case.k, generator=torch.Generator().manual_seed(1)).half()
            outs.append(torch.empty(2, case.n).half())
            run(packed, x, outs[-1])
            expected = oracle.reference(case.tensor, x)
            assert oracle.check(outs[-1], expected).passed, str(case)
        return outs

    own = [launched(case, monkeypatch, kernel=one, m=2, splits=1) for case in cases.values()]
    with monkeypatch.context() as patched:
        not_its_own(patched)
        apart = [launched(case, patched, kernel=one, m=2, splits=1) for case in cases.values()]
    assert [len(found) for found in apart] == [len(found) + 1 for found in own]
    harness.build_programs([program for found in (*own, *apart) for program in found])
    use(harness.launcher(counting=False), monkeypatch)
    first = results()
    not_its_own(monkeypatch)
    for name, one_y, other_y in zip(cases, first, results(), strict=True):
        assert torch.equal(one_y, other_y), name


SIDES = {
    "everything-in": ("x_scale", "permutation", "rotation", "side", "y_zero", "bias"),
    "everything-out": ("permutation", "side", "y_scale", "bias"),
    "column-scale-and-zero": ("x_scale", "x_zero"),
    "tensor-scale-and-zero": ("y_scale", "y_zero"),
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with these sides, as one unit."""
    found = [launched(SMALL[name], monkeypatch, m=2) for name in SIDES]
    harness.build_programs([program for programs in found for program in programs])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("name", SIDES)
def test_damaged_sides_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL[name]
    problem = problem_of(case, 2)
    use(harness.launcher(counting=False), monkeypatch)
    run, packed = prepare(NAIVE, problem, GPU, case.tensor)
    x = torch.randn(2, case.k, generator=torch.Generator().manual_seed(3)).half()
    expected = oracle.reference(case.tensor, x)

    def passed() -> bool:
        out = torch.full((2, case.n), float("nan")).half()
        run(packed, x, out)
        return oracle.check(out, expected, weights="float16").passed

    assert passed()
    assert set(SIDES[name]) == {n for n in packed.arrays if n not in ("codes", "books")}
    for side in SIDES[name]:
        array = packed[side].view(-1)
        kept = array.clone()
        if side == "permutation":
            array[:2] = kept[:2].flip(0)
        else:
            array[-1] += 2
        assert not passed(), f"a changed element of {side} passes"
        array.copy_(kept)


@pytest.mark.parametrize("name", ["everything-in", "everything-out", "rotated"])
def test_no_grid_is_too_large(name: str) -> None:
    case = dataclasses.replace(FIELDS[name], n=1 << 20, k=FIELDS[name].k)
    for m in (1, 70_000):
        for program in programs(case, m, 4, "float16"):
            assert program.grid[1] <= 65_535
            assert program.shared_bytes <= 48 << 10


@pytest.mark.parametrize("arch", [80, 120])
def test_machine_code_has_no_spills(arch: int) -> None:
    for program in programs(FIELDS["everything-in"], 8, 4, "float16"):
        code = read_cubin(program.compile(arch).cubin)
        assert code.spill_bytes == 0
        assert code.registers <= 128, "four blocks on a multiprocessor"


def test_the_workspace_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        sizes.append(made.nbytes)
        return made

    use(lambda program, _: lambda tensors: None, monkeypatch)
    for case in (*SMALL.values(), Case("split", PRESETS["aqlm-2x8"], 100, 2048)):
        problem = problem_of(case, 2)
        config = NAIVE.default(problem, GPU).replace(splits=4)
        run, packed = prepare(NAIVE, problem, GPU, case.tensor, config)
        x, out = torch.ones(2, case.k).half(), torch.empty(2, case.n).half()
        sizes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", counted)
            run(packed, x, out)
        declared = NAIVE.footprint(config, problem, GPU).workspace_bytes
        assert sum(sizes) <= declared, case
