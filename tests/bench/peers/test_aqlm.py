"""AQLM's kernels as peers: right through the oracle where they run, laid out right where not."""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from autotune.evaluate import check, evaluate, make_subject
from autotune.timers import set_threads
from bench.peers import aqlm, peers
from tests.autotune import zoo
from tests.interpreter import DEVICE, interpreted_kernels
from vqkernels import oracle
from vqkernels.device import detect_cpu
from vqkernels.presets import PRESETS, parse_format
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

pytest.importorskip("aqlm", reason="aqlm is not installed")

CPU = dataclasses.replace(detect_cpu(1), llc_bytes=1 << 16)


def tensor(name: str, n: int = 40, k: int = 128, *, bias: bool = False) -> QuantizedTensor:
    return random_tensor(parse_format(name), n, k, bias=bias, fit=False)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


def test_the_peers_are_found_and_are_not_the_registrys():
    assert {"aqlm/numba", "aqlm/triton", "aqlm/cuda"} <= set(peers())
    assert all(kernel.id == name for name, kernel in peers().items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["aqlm-2x8", "aqlm-1x8", "rq-3x256x4"])
def test_numba_is_right_and_is_timed_on_one_thread(one_thread, name, bias):
    subject = make_subject(tensor(name, bias=bias), 2, CPU)
    measured = evaluate(peers()["aqlm/numba"], subject, budget=zoo.BUDGET)
    assert measured.status == "ok", measured
    assert all(measured.correctness.controls.values())


@pytest.mark.parametrize("m", [7, 9])  # above 6 tokens the wheel decodes the weight
@pytest.mark.parametrize("name", ["aqlm-2x8", "aqlm-1x16", "vq-256x16"])
def test_what_the_wheel_decodes_on_a_gpu_is_the_weight(name, m):
    """By AQLM's own code, on what is packed for both of its GPU kernels."""
    subject = make_subject(tensor(name, bias=True), m, DEVICE, dtype="float16", place="cpu")
    measured = check(peers()["aqlm/triton"], subject)
    assert measured.status == "checked", measured


@pytest.mark.parametrize(("m", "dtype"), [(1, "float16"), (3, "float32")])
@pytest.mark.parametrize("name", ["aqlm-2x8", "aqlm-1x16"])
def test_triton_is_right_in_the_interpreter(monkeypatch, name, m, dtype):
    interpreted_kernels()
    with warnings.catch_warnings(action="ignore"):
        from aqlm.inference_kernels import triton_kernel
    # its autotuner times 20 configs on a GPU; the first stands for all
    tuned = triton_kernel._aqlm_gemv_simple
    monkeypatch.setattr(triton_kernel, "_aqlm_gemv_simple", Untuned(tuned))
    subject = make_subject(tensor(name, n=6), m, DEVICE, dtype=dtype, place="cpu")
    measured = check(peers()["aqlm/triton"], subject)
    assert measured.status == "checked", measured


class Untuned:
    def __init__(self, tuned):
        self.kernel, self.fixed = tuned.fn, tuned.configs[0].kwargs

    def __getitem__(self, grid):
        return lambda *words: self.kernel[grid](*words, **self.fixed)


def matvec(x, codes, books, scales, bias):
    """What cuda_kernel.cu does: products of a vector summed in half2, in fp32 from there on."""
    stages, _, _, length = books.shape
    raw = codes.view(torch.uint8 if codes.dtype == torch.int8 else torch.uint16).numpy()
    assert raw.flags.c_contiguous, "the kernels read rows as they lie"
    entries = [
        books[stage, :, 0].numpy()[raw[:, :, stage].astype(np.int64)] for stage in range(stages)
    ]
    weight = entries[0] if stages == 1 else entries[0] + entries[1]  # __hadd2
    out = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype)
    for token in range(x.shape[0]):
        cells = x[token].numpy().reshape(-1, length)
        sums = np.zeros((*weight.shape[:2], 2), np.float16)
        for pair in range(length // 2):
            here = slice(2 * pair, 2 * pair + 2)
            product = weight[:, :, here].astype(np.float32) * cells[:, here].astype(np.float32)
            sums = (product + sums).astype(np.float16)  # __hfma2
        out[token] = torch.from_numpy(sums.astype(np.float32).sum((1, 2))).half()
    out *= scales.flatten()
    return out if bias is None else out + bias


@pytest.fixture
def extension(monkeypatch):
    """The CUDA extension, built of numpy."""
    name = "aqlm.inference_kernels.cuda_kernel"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for op in ("code1x16_matmat", "code2x8_matmat", "code1x8_matmat"):
        monkeypatch.setattr(torch.ops.aqlm, op, matvec, raising=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["aqlm-2x8", "aqlm-1x16", "aqlm-1x8", "vq-65536x16"])
def test_cuda_reads_what_is_packed_and_keeps_the_bound(extension, name, bias):
    subject = make_subject(tensor(name, k=1024, bias=bias), 3, DEVICE, dtype="float16", place="cpu")
    measured = check(peers()["aqlm/cuda"], subject)
    assert measured.status == "checked", measured
    assert measured.correctness.worst > 0.05


def test_the_half_sums_are_no_licence(extension):
    """One wrong code of 1024 in a row is seen in spite of the wider bound."""
    kernel = peers()["aqlm/cuda"]
    whole = tensor("aqlm-2x8", n=8, k=8192)
    codes = whole.parts["codes"].clone()
    codes[-1, -1, 0] ^= 1
    x = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0)).half()
    wrong = oracle.reference(whole.replace_parts(codes=codes), x).y.half()
    problem = Problem(m=1, n=8, k=8192, spec=whole.spec, dtype="float16")
    bounds = {"weights": kernel.rounds_to(problem), "chain": kernel.half_chain}
    expected = oracle.reference(whole, x)
    assert oracle.check(expected.y.half(), expected, **bounds).passed
    assert not oracle.check(wrong, expected, **bounds).passed


@pytest.mark.parametrize(
    ("kernel", "fields", "device", "words"),
    [
        ("numba", {}, DEVICE, "runs on a CPU"),
        ("numba", {}, detect_cpu(2), "use --threads 1"),
        ("numba", {"stages": [16]}, CPU, "256 entries"),
        ("triton", {}, CPU, "runs on a GPU"),
        ("triton", {"stages": [256] * 3}, DEVICE, "powers of two"),
        ("cuda", {}, CPU, "run on a GPU"),
        ("cuda", {"stages": [256] * 4}, DEVICE, "1x16, 2x8 and 1x8"),
        ("cuda", {"vector_length": 16}, DEVICE, "1x16, 2x8 and 1x8"),
        ("cuda", {"vector_axis": "out"}, DEVICE, "vectors along in"),
        ("cuda", {"permuted": True}, DEVICE, "nothing else"),
        ("cuda", {"scale_axis": "column"}, DEVICE, "nothing else"),
        ("cuda", {"subspaces": 2}, DEVICE, "several codebook sets"),
        ("cuda", {"stages": [256, 16]}, DEVICE, "one size"),
    ],
)
def test_a_refusal_names_the_limit(kernel, fields, device, words):
    base = {"vector_length": 8, "stages": [256], "code_bits": []}
    spec = CodebookSpec.from_dict({**base, **fields})
    dtype = "float32" if kernel == "numba" else "float16"
    problem = Problem(m=1, n=64, k=1024, spec=spec, dtype=dtype)
    reason = peers()[f"aqlm/{kernel}"].supports(problem, device)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(("k", "reads"), [(1024, None), (1032, "64 inputs"), (1020, "multiple")])
def test_cuda_reads_whole_loads(k, reads):
    problem = Problem(m=1, n=64, k=k, spec=PRESETS["aqlm-2x8"], dtype="float16")
    reason = peers()["aqlm/cuda"].supports(problem, DEVICE)
    assert reason is None if reads is None else reads in reason


def test_without_the_wheel_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(aqlm.importlib.util, "find_spec", lambda name: None)
    problem = Problem(m=1, n=64, k=1024, spec=PRESETS["aqlm-2x8"], dtype="float16")
    for name in ("aqlm/triton", "aqlm/cuda"):
        reason = peers()[name].supports(problem, DEVICE)
        assert "aqlm is not installed; run: " in reason
