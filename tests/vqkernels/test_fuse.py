"""Weights of one input as one: the same numbers, from one product, or a refusal that says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from vqkernels import oracle
from vqkernels.device import detect_cpu
from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.fuse import fuse, fuse_named, fused_spec
from vqkernels.kernel import Kernel, registry
from vqkernels.kernels import layout
from vqkernels.nn import FusedVQLinear, replace_linears
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor, row_step
from vqkernels.testing import Case, conformance_cases, prepare

CPU = detect_cpu(2)
RQ, AQLM = PRESETS["rq-2x256x8"], PRESETS["aqlm-2x8"]
# Shared by all rows of a weight, and so by weights that are fused.
COMMON = ("permutation", "rotation", "uniform_scale", "uniform_zero", "outlier_codebook")


def siblings(spec: CodebookSpec, sizes: tuple[int, ...], k: int, **options: Any) -> list[Any]:
    """Random weights of these sizes that agree where weights must to be fused."""
    made = [
        random_tensor(spec, n, k, seed=n + i, fit=False, **options) for i, n in enumerate(sizes)
    ]
    names = [*COMMON]
    names += ["scale"] * (spec.scale_axis == "column") + ["zero"] * (spec.zero_axis == "column")
    shared = {name: made[0].parts[name] for name in names if name in made[0].parts}
    return [one.replace_parts(**shared) for one in made]


def fusable(case: Case) -> list[QuantizedTensor] | None:
    step = row_step(case.spec)
    if case.spec.group_axis == "column":
        return None
    return siblings(case.spec, (4 * step, 2 * step, 2 * step + 3), case.k, bias=case.bias)


@pytest.mark.parametrize("case", [case.small() for case in conformance_cases()], ids=str)
def test_the_fused_weight_is_the_weights(case: Case) -> None:
    tensors = fusable(case)
    if tensors is None:
        with pytest.raises(UnsupportedError, match="groups of columns"):
            fused_spec(case.spec, (16, 16), case.k)
        return
    fused = fuse(tensors)
    fused.validate()
    assert torch.equal(fused.decode(), torch.cat([one.decode() for one in tensors]))
    assert fused.spec == fused_spec(case.spec, [one.n for one in tensors], case.k)
    if case.bias:
        assert torch.equal(fused.parts["bias"], torch.cat([one.parts["bias"] for one in tensors]))


def test_one_weight_stays_as_it_is() -> None:
    (tensor,) = siblings(RQ, (24,), 64)
    assert fuse([tensor]) is tensor


def test_equal_codebooks_stay_one() -> None:
    one, other = siblings(AQLM, (24, 17), 64)
    books = {name: one.parts[name] for name in one.parts if name.startswith("codebook_")}
    fused = fuse([one, other.replace_parts(**books)])
    assert fused.spec == AQLM
    assert torch.equal(fused.decode()[24:], other.replace_parts(**books).decode())


def test_a_missing_bias_is_zero() -> None:
    (one,), (other,) = siblings(RQ, (24,), 64, bias=True), siblings(RQ, (17,), 64)
    fused = fuse([one, other])
    assert fused.bias is not None
    assert torch.equal(fused.bias[:24], one.parts["bias"])
    assert not fused.bias[24:].any()


def refusals() -> dict[str, tuple[list[QuantizedTensor], str]]:
    out = PRESETS["toy-16-4"]
    permuted = dataclasses.replace(RQ, permuted=True)
    scaled = dataclasses.replace(RQ, scale_axis="column")
    return {
        "none": ([], "no weights"),
        "formats": ([*siblings(RQ, (16,), 64), *siblings(AQLM, (16,), 64)], "another format"),
        "inputs": ([*siblings(RQ, (16,), 64), *siblings(RQ, (16,), 72)], "inputs .72."),
        "permutations": (
            [random_tensor(permuted, 16, 64, seed=s, fit=False) for s in (0, 1)],
            "weight 2 has another permutation",
        ),
        "column scales": (
            [random_tensor(scaled, 16, 64, seed=s, fit=False) for s in (0, 1)],
            "another scale",
        ),
        "cut vectors": (siblings(out, (13, 16), 64), "13 rows .* blocks of 8"),
        "no common group": (siblings(RQ, (16, 15, 16), 64), "larger common group than 1 rows"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_can_not_be_one_says_why(name: str) -> None:
    tensors, words = refusals()[name]
    with pytest.raises(UnsupportedError, match=words):
        fuse(tensors)


# ------------------------------------------------------------------------------------------------
# products


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def product(kernel: Kernel, tensor: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    problem = Problem(m=x.shape[0], n=tensor.n, k=tensor.k, spec=tensor.spec)
    run, packed = prepare(kernel, problem, CPU, tensor)
    out = torch.full((x.shape[0], tensor.n), float("nan"))
    run(packed, x, out)
    return out


def hold_to_the_products(spec: CodebookSpec, kernel_id: str) -> None:
    kernel, tensors = registry()[kernel_id], siblings(spec, (64, 16, 16), 256)
    fused, x = fuse(tensors), tokens(8, 256)
    y = product(kernel, fused, x)
    assert oracle.check(y, oracle.reference(fused, x)).passed
    apart = [product(kernel, one, x) for one in tensors]
    assert torch.equal(y, torch.cat(apart, dim=1)), kernel_id


def test_a_fused_product_gives_the_products_bits() -> None:
    hold_to_the_products(RQ, "numba/fused_rq")


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", ["numba/naive", "numba/vectorized", "numba/fused_rq"])
@pytest.mark.parametrize("name", ["aqlm-2x8", "pq-m8", "vptq-65536-256", "rq-3x256x8"])
def test_fused_products_give_the_products_bits(name: str, kernel: str) -> None:
    spec = PRESETS[name]
    problem = Problem(m=8, n=96, k=256, spec=fused_spec(spec, (64, 16, 16), 256))
    if registry()[kernel].supports(problem, CPU) is None:
        hold_to_the_products(spec, kernel)


def test_copies_of_a_codebook_are_packed_once() -> None:
    tensors = siblings(PRESETS["pq-m4"], (32, 16, 16), 256)
    fused = fuse(tensors)
    assert fused.parts["codebook_0"].shape[:2] == (4, 4), "three weights, four groups of 16 rows"
    problem = Problem(m=1, n=64, k=256, spec=fused.spec, dtype="float16")
    packed = layout.arrays(fused, "cells", problem)
    assert packed["books"].shape[0] == 3 * 4
    assert packed["row_sets"].tolist() == [0] * 32 + [4] * 16 + [8] * 16
    whole = layout.arrays(fused, "cells", problem, shared=False)
    assert whole["books"].shape[0] == 4 * 4


def cuda_kernels() -> list[str]:
    return [k.id for k in registry().kernels.values() if k.backend == "cuda"]


@pytest.mark.parametrize("name", ["toy-16-4", pytest.param("aqlm-2x8", marks=pytest.mark.sweep)])
def test_cuda_kernels_read_shared_codebooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")
    from tests.vqkernels.kernels.cuda.test_kernels import HOPPER, Trial, run_all

    case = Case(name, PRESETS[name], 64, 128)
    fused = fuse(siblings(case.spec, (32, 16, 16), case.k))
    one = Case(name, fused.spec, fused.n, fused.k)
    object.__setattr__(one, "tensor", fused)
    trials = [Trial(kernel, one, 2, device=HOPPER) for kernel in cuda_kernels()]
    passed = run_all(trials, monkeypatch)
    assert sum(passed.values()) >= 5, passed


# ------------------------------------------------------------------------------------------------
# in a model


def test_a_fused_layer_gives_views_of_one_result() -> None:
    tensors = siblings(AQLM, (32, 16, 16), 64)
    layer = FusedVQLinear.from_quantized(tensors)
    x = tokens(2, 4, 64)  # 8 tokens: compiled for them already
    parts = layer(x)
    assert [part.shape[-1] for part in parts] == [32, 16, 16]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    for part, tensor in zip(parts, tensors, strict=True):
        got = oracle.check(part.reshape(8, -1), oracle.reference(tensor, x.view(8, -1)))
        assert got.passed
    assert "sizes=[32, 16, 16]" in repr(layer)
    with pytest.raises(TensorError, match="64 output features, but sizes of 48"):
        FusedVQLinear(layer.linear, [32, 16])


def test_tensors_of_a_model_with_fused_layers() -> None:
    q, k, v, o = siblings(RQ, (32, 16, 16, 32), 64)
    named = {"0.q.weight": q, "0.k.weight": k, "0.v.weight": v, "0.o.weight": o, "1.q": q}
    fused = fuse_named(named, {"qkv": ("q", "k", "v")})
    assert set(fused) == {"0.qkv.weight", "0.o.weight", "1.q"}, "1 has no k and v"
    model = nn.ModuleDict({"0": nn.ModuleDict({"qkv": nn.Linear(64, 64, bias=False)})})
    replace_linears(model, {"0.qkv.weight": fused["0.qkv.weight"]})
    x = tokens(8, 64)
    y = model["0"]["qkv"](x)
    for part, tensor in zip(y.split([32, 16, 16], dim=-1), (q, k, v), strict=True):
        assert oracle.check(part, oracle.reference(tensor, x)).passed
