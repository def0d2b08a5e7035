"""cuda/mma in every variant: on formats of all kinds under the harness, and what it compiles to.

test_kernels.py holds its defaults and configs at random to the oracle, with every other kernel's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from autotune.inspection import inspect_kernel, stand_in
from tests.cuda import harness
from tests.vqkernels.kernels.cuda.test_kernels import (
    HOPPER,
    Trial,
    build,
    run_all,
    sites,
    use,
)
from vqkernels import oracle
from vqkernels.kernels.cuda import mma, tiles
from vqkernels.presets import PRESETS, parse_format
from vqkernels.problem import Dtype, Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor
from vqkernels.testing import Case, prepare

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

VARIANTS = tuple(mma.LEAST_TOKENS)


def spec(length: int, stages: tuple[int, ...], **fields: object) -> CodebookSpec:
    return CodebookSpec.from_dict({"vector_length": length, "stages": stages, **fields})


def trial(case: Case, m: int, dtype: Dtype = "float16", seed: int = 0, **changes: object) -> Trial:
    """The default config with some values exchanged; raises where it breaks a rule."""
    plain = Trial("cuda/mma", case, m, dtype=dtype, seed=seed)
    reason = mma.supports(plain.problem, HOPPER)
    assert reason is None, reason
    config = mma.default(plain.problem, HOPPER).replace(**changes)
    mma.SPACE.check(config)
    return dataclasses.replace(plain, config=config)


# ------------------------------------------------------------------------------------------------
# right


# lengths of both axes, one to three stages of byte and 16-bit codes, more entries than fit
SHAPES = (
    *((length, stages) for length in (8, 16, 32) for stages in ((256,), (250, 17), (60, 9, 30))),
    (8, (256, 256, 256, 256)),
    (8, (300, 256)),
    (8, (7000, 256)),
)


def cases(variant: str, axis: str) -> Iterator[Case]:
    """Ragged n and k, and a format each of SHAPES."""
    entries = "int8" if variant == "bytes" else "float16"
    for i, (length, stages) in enumerate(SHAPES):
        one = spec(length, stages, vector_axis=axis, codebook_dtype=entries)
        k = (i % 5 + 9) * 2 * length - 3 if axis == "in" else 130 + i % 9
        yield Case(f"{variant}-{axis}-{length}-{stages}", one, 65 + 3 * i, k)
    if axis == "in" and variant in ("a", "b"):
        yield Case(f"{variant}-4", spec(4, (256, 30)), 70, 101)


def every_choice(variant: str, axis: str) -> list[Trial]:
    """Each case once, with the other choices in turn; m from one token to three passes."""
    least, found = mma.LEAST_TOKENS[variant], []
    for i, case in enumerate(cases(variant, axis)):
        changes = {
            "variant": variant,
            "tokens": least if variant == "split" else max(least, (8, 16, 32)[i % 3]),
            "combine": ("mma", "hadd2")[i % 2 if variant != "bytes" else 0],
            "replicas": (1, 4, 8, 16)[i % 4] if case.spec.vector_length < 32 else 1,
            "warps": (4, 8)[i % 2],
            "warps_k": (1, 2, 4)[i % 3],
            "splits": (1, 2)[i // 2 % 2],
            "depth": (1, 2, 4)[i // 3 % 3],
            "hot_entries": 4096 * (i % 2),
        }
        m = (1, 5, 9, 17, 33)[i % 5] if variant != "split" else (1, 4, 6)[i % 3]
        dtype: Dtype = "bfloat16" if i % 4 == 1 else "float16"
        found.append(trial(case, m, dtype, seed=i, **changes))
    return found


COMBINATIONS = [
    (v, axis) for v in VARIANTS for axis in ("in", "out") if (v, axis) != ("bytes", "out")
]


@pytest.mark.parametrize(("variant", "axis"), COMBINATIONS)
@pytest.mark.sweep
def test_every_variant(variant: str, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = every_choice(variant, axis)
    assert run_all(trials, monkeypatch)["cuda/mma"] == len(trials)


@pytest.mark.sweep
@pytest.mark.parametrize("m", [1, 2, 7, 16, 31, 64])
def test_every_m_in_defaults(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = ("rq-2x256x8", "vptq-256-16", "vq-256x32")
    trials = [trial(Case(name, parse_format(name), 75, 413), m) for name in formats]
    assert run_all(trials, monkeypatch)["cuda/mma"] == len(formats)


SETS = (
    spec(8, (256, 64), group_axis="row", group_size=67),
    spec(8, (256, 64), group_axis="row", group_size=128),
    spec(8, (256, 64), group_axis="row", group_size=40, codebook_dtype="int8"),
    spec(8, (100, 64), group_axis="row", group_size=72, vector_axis="out"),
    spec(8, (256, 64), group_axis="column", group_size=40),
    spec(8, (100, 64), group_axis="column", group_size=40, vector_axis="out"),
    spec(8, (256, 64), subspaces=3),
)


def sets_trial(i: int) -> Trial:
    """Of rows, in units that begin anew with each; of columns, all at hand."""
    return trial(
        Case(f"sets-{i}", SETS[i], 140, 205),
        3,
        variant="bytes" if SETS[i].codebook_dtype == "int8" else "b",
        combine="mma",
        tokens=16,
        warps=4,
        warps_k=(2, 1, 4)[i % 3],
    )


def test_a_block_goes_on_to_another_codebook_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 sets in 16 blocks; the warps of a unit meet nowhere else than at the codebooks."""
    case = Case("sets", spec(8, (64, 9), group_axis="row", group_size=33), 33 * 18 - 5, 69)
    one = trial(case, 3, variant="b", tokens=16, warps=4, warps_k=1, blocks=16, splits=1)
    assert run_all([one], monkeypatch)["cuda/mma"] == 1


@pytest.mark.sweep
def test_codebook_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [sets_trial(i) for i in range(len(SETS))]
    assert run_all(trials, monkeypatch)["cuda/mma"] == len(SETS)


# ------------------------------------------------------------------------------------------------
# x that is hard


def product_of(one: Trial, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    build([one], monkeypatch)
    use(harness.launcher(counting=False), monkeypatch)
    run, packed = prepare(mma.KERNEL, one.problem, one.device, one.case.tensor, one.config)
    out = torch.full((one.m, one.case.n), float("nan"), dtype=x.dtype)
    run(packed, x, out)
    return out


def config_of(variant: str) -> dict[str, object]:
    return {
        "variant": variant,
        "combine": "mma",
        "tokens": mma.LEAST_TOKENS[variant],
        "warps": 4,
        "warps_k": 2,
    }


def hard(variant: str, dtype: Dtype) -> Trial:
    entries = "int8" if variant == "bytes" else "float16"
    case = Case("hard", spec(8, (256, 256), codebook_dtype=entries), 21, 301)
    return trial(case, 3, dtype, **config_of(variant))


def scaled(one: Trial, factor: float) -> Trial:
    """The same weight times a power of two, so that fp16 holds the results."""
    tensor, parts = one.case.tensor, {}
    for name, part in tensor.parts.items():
        if name.startswith("codebook") and part.is_floating_point():
            parts[name] = (part.float() * factor).to(part.dtype)
    case = dataclasses.replace(one.case)
    object.__setattr__(case, "tensor", tensor.replace_parts(**parts))
    return dataclasses.replace(one, case=case)


@pytest.mark.parametrize(("size", "usual", "factor"), [(1e-6, 1e-3, 2.0**10), (6e4, 1, 2.0**-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_x_of_every_size(variant, size, usual, factor, monkeypatch) -> None:
    """A token of 1e-6 or 6e4, a usual one, and one with both."""
    one = scaled(hard(variant, "float16"), factor)
    x = torch.randn(3, one.case.k, generator=torch.Generator().manual_seed(3)) * usual
    x[0] = (x[0] / usual / 4).clamp(-1, 1) * size
    x[2, ::7] = size
    x = x.half()
    out = product_of(one, x, monkeypatch)
    expected = oracle.reference(one.case.tensor, x)
    assert oracle.check(out, expected, weights="float16").passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_token_stays_alone(variant: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    one = hard(variant, "float16")
    x = torch.randn(3, one.case.k, generator=torch.Generator().manual_seed(3)).half()
    right = product_of(one, x, monkeypatch)
    x[1, 7] = bad
    out = product_of(one, x, monkeypatch)
    assert torch.equal(out[0::2], right[0::2])
    assert not torch.isfinite(out[1]).any()


def test_bytes_are_exact_up_to_their_scale() -> None:
    x = torch.randn(4, 24).half()
    x[2] = 0
    pairs, scale = mma.split_bytes(x)
    whole = 256 * pairs[:, :, 0].double() + pairs[:, :, 1].double()
    error = (whole.flatten(1) * scale - x.double()).abs()
    assert (error <= 0.5 * scale.double() * (1 + 1e-5)).all()
    assert whole.abs().max() == 32639


# ------------------------------------------------------------------------------------------------
# what it does on chip


@pytest.mark.parametrize(("variant", "length"), [("b", 8), ("a", 4), ("bytes", 8), ("split", 16)])
def test_all_copies_have_no_bank_conflicts(
    variant: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in gathers, with 128 bytes of copies, nor in filling and exchanging."""
    entries = "int8" if variant == "bytes" else "float16"
    case = Case("aligned", spec(length, (256, 256), codebook_dtype=entries), 64, 64 * length)
    changes = config_of(variant) | {"replicas": 16, "splits": 1}
    report = sites(trial(case, 4, **changes), monkeypatch)
    for kind in ("shared_load", "shared_store"):
        assert report.total(kind, "wavefronts") == report.total(kind, "ideal") > 0
    one = sites(trial(case, 4, **(changes | {"replicas": 1})), monkeypatch)
    assert one.total("shared_load", "wavefronts") > 1.2 * one.total("shared_load", "ideal")


def test_codes_are_read_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a chunk of 1 KB a warp, loaded ahead of a unit that never comes."""
    case = Case("aligned", spec(8, (256, 256)), 128, 2048)
    one = trial(case, 16, warps=4, warps_k=4, splits=1, blocks=32, depth=1, replicas=1)
    report = sites(one, monkeypatch)
    bytes_of_codes, blocks, warps = 128 * 256 * 2, 2, 4
    loads = [s for s in report.sites if s.kind == "global_load" and s.bytes >= bytes_of_codes]
    codes = min(loads, key=lambda site: site.bytes)
    assert codes.bytes == bytes_of_codes + blocks * warps * 2 * 512
    assert codes.sectors * 32 == codes.bytes


def test_hot_entries_are_the_most_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9,000 entries the 4,096 at hand serve most codes; some hundred others are used once."""
    tensor = random_tensor(spec(8, (9000,)), 128, 512, fit=False)
    codes = tensor.parts["codes"].int()
    codes[:, ::4] = 8900
    assert len(codes.unique()) > 4096 + 100
    case = Case("skewed", tensor.spec, 128, 512)
    used = tensor.replace_parts(codes=codes.to(tensor.parts["codes"].dtype))
    object.__setattr__(case, "tensor", used)
    one = trial(case, 2, hot_entries=4096, splits=1)
    report = sites(one, monkeypatch)
    gathered = [s for s in report.sites if s.kind == "shared_load" and "gather" in s.file]
    assert 0.8 * codes.numel() < sum(s.lanes for s in gathered) < codes.numel()
    assert run_all([one], monkeypatch)["cuda/mma"] == 1


# ------------------------------------------------------------------------------------------------
# configs and refusals


def plan(format_: CodebookSpec, dtype: Dtype = "float16", **changes: object) -> tiles.Tiling:
    problem = Problem(m=4, n=64, k=512, spec=format_, dtype=dtype)
    return tiles.Tiling(mma.default(problem, HOPPER).replace(**changes), problem)


def test_what_a_format_rules_out_falls_back() -> None:
    two = spec(8, (256, 256))
    assert plan(two, variant="bytes", tokens=8).variant == "a"
    assert plan(spec(4, (256,)), variant="split", tokens=4).variant == "a"
    assert plan(spec(8, (256,), codebook_dtype="int8"), variant="bytes").variant == "bytes"
    assert plan(two, combine="hadd2").hadd2
    assert not plan(two, "bfloat16", combine="hadd2").hadd2
    assert not plan(spec(8, (256,)), combine="hadd2").hadd2


@pytest.mark.parametrize(
    ("format_", "dtype", "reason"),
    [
        (spec(8, (256,)), "float32", "tf32"),
        (spec(3, (50,)), "float16", "vectors of 3"),
        (spec(4, (50,), vector_axis="out"), "float16", "along the outputs"),
        (spec(8, (50,), vector_axis="out", subspaces=2), "float16", "subspaces"),
        (spec(8, (50,), vector_axis="out", group_axis="column", group_size=12), "float16", "12"),
        (PRESETS["vq-256x8-channel"], "float16", "every 1 rows"),
        (spec(32, (4096, 4096)), "float16", "of shared memory"),
    ],
)
def test_refusals(format_: CodebookSpec, dtype: Dtype, reason: str) -> None:
    problem = Problem(m=4, n=64, k=512, spec=format_, dtype=dtype)
    said = mma.supports(problem, HOPPER)
    assert said is not None
    assert reason in said


# ------------------------------------------------------------------------------------------------
# machine code


FORMATS = ("aqlm-2x8", "rq-4x256x8", "vptq-65536-256", "pq-m8", "vq-256x32", "aqlm-1x16")


def problem_of(name: str, m: int) -> Problem:
    return Problem(m=m, n=4096, k=4096, spec=parse_format(name), dtype="float16")


@pytest.fixture
def tools() -> None:
    pytest.importorskip("triton", reason="nvdisasm comes with Triton")


def per_code_and_stage(arch: str, **changes: object) -> float:
    """Instructions of the hot loop for 32 codes of a stage, two stages of 256 entries."""
    asked, device = problem_of("aqlm-2x8", 16), stand_in(arch)
    config = mma.default(asked, device).replace(**changes)
    (found,) = inspect_kernel(mma.KERNEL, asked, arch, config)
    assert found.code is not None, found.reason
    codes = tiles.Tiling(config, asked).lane_codes * config.number("depth")
    return found.code.loop.instructions / (2 * codes)


ARCHS = ("sm_80", pytest.param("sm_89", marks=pytest.mark.sweep), "sm_90")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", ARCHS)
def test_five_instructions_for_a_code_of_a_stage(arch: str) -> None:
    """A byte permute, a load and two mma, and 1 for codes, x and the loop; W as A takes fewer."""
    assert per_code_and_stage(arch, variant="b", tokens=16, combine="mma") <= 5
    assert per_code_and_stage(arch, variant="a", tokens=8, combine="hadd2") <= 5.2
    assert per_code_and_stage(arch, variant="split", tokens=4, combine="mma") <= 4


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize(("name", "m"), [("aqlm-2x8", 16), ("vptq-65536-256", 4)])
def test_defaults_spill_nothing(name: str, m: int, arch: str) -> None:
    (found,) = inspect_kernel(mma.KERNEL, problem_of(name, m), arch)
    assert found.code is not None, found.reason
    assert found.code.spill_bytes == 0
    assert found.code.loop.tensor


@pytest.mark.sweep
@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_default_spills(name: str, arch: str) -> None:
    for m in (1, 4, 8, 16, 32, 64):
        for found in inspect_kernel(mma.KERNEL, problem_of(name, m), arch):
            assert found.code is not None, found.reason
            assert found.code.spill_bytes == 0, m
