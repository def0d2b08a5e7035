"""The reference, the bound that kernels are held to, and the controls that must fail it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import quantized_tensors
from vqkernels import oracle
from vqkernels.presets import PRESETS
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.testing import Case, conformance_cases

CASES = conformance_cases()


def tokens(k: int, m: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(tensor=quantized_tensors(), m=st.integers(1, 4))
def test_reference_is_the_product_with_the_decode(tensor: QuantizedTensor, m: int) -> None:
    x = tokens(tensor.k, m)
    expected = x.double().numpy() @ tensor.decode().numpy().T
    if tensor.bias is not None:
        expected = expected + tensor.bias.double().numpy()
    np.testing.assert_allclose(
        oracle.reference(tensor, x).y.numpy(), expected, rtol=1e-9, atol=1e-9
    )


def test_reference_in_chunks_is_the_whole(monkeypatch) -> None:
    tensor = random_tensor(PRESETS["vptq-65536-256"], 1030, 4104)
    x = tokens(4104)
    whole = oracle.reference(tensor, x)
    monkeypatch.setattr(oracle, "_CHUNK_WEIGHTS", 4104 * 50)
    parts = oracle.reference(tensor, x)
    torch.testing.assert_close(whole.y, parts.y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.spread, parts.spread, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_negative_control_is_caught(case: Case) -> None:
    caught = oracle.negative_controls(case.tensor, tokens(case.k))
    wanted = {"zeros", "unwritten", "dropped row", "swapped codebook", "off-by-one code"}
    wanted |= {"dropped tail"} | ({"dropped stage"} if len(case.spec.stages) > 1 else set())
    assert set(caught) == wanted
    assert [name for name, seen in caught.items() if not seen] == []


@pytest.mark.parametrize("k", [1024, 11008, 28672])
def test_one_wrong_code_in_a_long_row_is_seen(k: int) -> None:
    tensor = random_tensor(PRESETS["rq-2x256x8"], 64, k)
    x = tokens(k)
    codes = tensor.parts["codes"].clone()
    codes[63, -1, 1] ^= 1
    wrong = oracle.reference(tensor.replace_parts(codes=codes), x).y.float()
    assert not oracle.check(wrong, oracle.reference(tensor, x)).passed


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("name", ["vq-256x8", "opq-m8", "rq-4x256x8", "vptq-65536-256"])
def test_one_long_fp32_chain_is_within_the_bound(name: str, order: str) -> None:
    tensor = random_tensor(PRESETS[name], 1024, 4096)
    x = tokens(4096, m=4)
    weight = tensor.decode(torch.float32).numpy().T
    columns = range(4096) if order == "forward" else range(4095, -1, -1)
    total = np.zeros((4, 1024), np.float32)
    for column in columns:
        total += x[:, column : column + 1].numpy() * weight[column]
    verdict = oracle.check(torch.from_numpy(total), oracle.reference(tensor, x))
    assert 0.001 < verdict.worst < 0.5, "the bound is neither broken nor far from what it bounds"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_the_output_is_allowed_for(dtype: torch.dtype) -> None:
    tensor = random_tensor(PRESETS["vq-256x8"], 256, 512)
    x = tokens(512).to(dtype)
    expected = oracle.reference(tensor, x)
    right = expected.y.to(dtype)
    assert oracle.check(right, expected).passed
    # two steps away is outside
    step = 2 * expected.y.abs() * 2 * oracle.UNIT_ROUNDOFF[str(dtype).removeprefix("torch.")]
    assert not oracle.check((expected.y + step).to(dtype), expected).passed


def test_rounded_weights_are_allowed_for_only_when_declared() -> None:
    tensor = random_tensor(PRESETS["rq-2x256x8"], 256, 512)
    x = tokens(512).half()
    expected = oracle.reference(tensor, x)
    out = (x.double() @ tensor.decode().half().double().T).float()
    assert oracle.check(out, expected, weights="float16").passed
    assert not oracle.check(out, expected).passed


def test_nan_must_stand_where_the_reference_has_it() -> None:
    tensor = random_tensor(PRESETS["vq-256x8"], 256, 64)
    x = tokens(64, m=3)
    x[1, 3] = math.nan
    expected = oracle.reference(tensor, x)
    out = expected.y.float()
    assert oracle.check(out, expected).passed
    for token, value in ((1, 0.0), (0, math.nan)):
        wrong = out.clone()
        wrong[token, 7] = value
        assert not oracle.check(wrong, expected).passed


def test_an_all_zero_row_admits_zero_only() -> None:
    tensor = random_tensor(PRESETS["vq-256x8"], 256, 64)
    book = torch.zeros_like(tensor.parts["codebook_0"])
    expected = oracle.reference(tensor.replace_parts(codebook_0=book), tokens(64))
    assert oracle.check(torch.zeros(2, 256), expected).passed
    assert not oracle.check(torch.full((2, 256), 1e-20), expected).passed


def test_short_chains_in_half_precision_are_allowed_for_only_when_declared() -> None:
    tensor = random_tensor(PRESETS["vq-256x8"], 256, 2048)
    x = tokens(2048).half()
    products = x.float()[:, None] * tensor.decode(torch.float32)
    sums = torch.zeros(*products.shape[:2], 256, dtype=torch.float16)
    for step in products.unflatten(2, (256, 8)).unbind(3):
        sums = (sums.float() + step).half()
    out, expected = sums.float().sum(2), oracle.reference(tensor, x)
    assert oracle.check(out, expected, weights="float16", chain=8).passed
    assert not oracle.check(out, expected).passed
    worst = [oracle.check(out, expected, weights="float16", chain=c).worst for c in (1, 8)]
    assert worst[0] / worst[1] == pytest.approx(math.sqrt(8), rel=0.05)
