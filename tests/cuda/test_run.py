"""How the harness builds, launches and gives up."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.harness import ORDERS, BuildError, Kind, Source, build, build_programs, run_program
from tests.cuda.samples import Sample, Samples, build_samples, numbers
from vqkernels.kernels.cuda.program import Program

SAMPLES = {
    "spins": Sample(
        "const auto s = shared_memory().as<int>();\n"
        "if (t == 0) s.store(0, 1);\n"
        "while (s.load(0) != 2) {}\n"
    ),
    "two_faults": Sample("in.load(-1); // here\nout.store(t, in.load(a.n)); // other\n"),
    "aligned": Sample("out.store(t, in.load<Pack<float, 4>>(t * 4).at[0]);\n"),
    "sums": Sample(
        "const auto s = shared_memory().as<float>();\n"
        "const int i = int(blockIdx.x) * 256 + t;\n"
        "s.store(t, in.load(i));\n"
        "for (int half = 128; half > 0; half /= 2) {\n"
        "    sync_block();\n"
        "    if (t < half) s.store(t, s.load(t) + s.load(t + half));\n"
        "}\n"
        "if (t == 0) out.store(blockIdx.x, s.load(0));\n"
    ),
    "places": Sample(
        "const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;\n"
        "out.store(block * int(blockDim.x) + t, 1000 * block + t);\n",
        out="int",
    ),
}


@pytest.fixture(scope="module")
def kernels() -> Samples:
    return build_samples(SAMPLES)


def test_waiting_in_a_loop_ends(kernels: Samples) -> None:
    report = kernels.run("spins", numbers(1), torch.empty(1), shared_bytes=4, counting=False)
    assert Kind.DEADLOCK in [fault.kind for fault in report.faults]


def test_the_launch_ends_at_the_last_fault_that_is_asked_for(kernels: Samples) -> None:
    lines = [SAMPLES["two_faults"].line(mark) for mark in ("here", "other")]
    for most in (1, 2, 3):
        report = kernels.run("two_faults", numbers(8), torch.empty(32), max_faults=most)
        assert [fault.line for fault in report.faults] == lines[:most]
        assert "-4 to 0 of buffer in" in report.faults[0].message
        with pytest.raises(AssertionError, match=f"two_faults.cu:{lines[0]}: thread 0 of block"):
            report.check()


def test_buffers_may_miss_an_alignment(kernels: Samples) -> None:
    given, out = numbers(128), torch.empty(32)
    kernels.run("aligned", given, out, skew=16).check()
    assert out.equal(given[::4])
    (fault,) = kernels.run("aligned", given, out, skew=8).faults
    assert fault.kind is Kind.MISALIGNED


def test_blocks_and_threads_have_their_numbers(kernels: Samples) -> None:
    out = torch.empty(12 * 40, dtype=torch.int32)
    kernels.run("places", numbers(1), out, grid=(2, 3, 2), threads=40).check()
    expected = 1000 * torch.arange(12)[:, None] + torch.arange(40)
    assert out.equal(expected.flatten().int())


@pytest.mark.parametrize("seed", ORDERS)
def test_blocks_of_many_threads(kernels: Samples, seed: int) -> None:
    given, out = numbers(32 * 256), torch.empty(32)
    options = {"grid": (32, 1, 1), "threads": 256, "shared_bytes": 1024, "seed": seed}
    kernels.run("sums", given, out, **options).check()
    torch.testing.assert_close(out, given.view(32, 256).sum(1))


def test_a_kernel_that_does_not_compile_says_why() -> None:
    with pytest.raises(BuildError, match="no_such_function"):
        build([Source('extern "C" void k(int) { no_such_function(); }', "k")])


# ---------------------------------------------------------------------------------- real kernels


def naive(layout: str, length: int) -> Program:
    """A product of `m = 3, n = 37, k = 104` with two stages of 256 entries."""
    columns = 104 // length
    return Program(
        kernel="naive",
        types={"X": "__half", "Entry": "__half", "Code": "vq::u8", "Out": "float"},
        constants={
            "STAGES": 2,
            "LENGTH": length,
            "ALONG_IN": True,
            "LAYOUT": f"vq::Layout::{layout}",
            "ROW_SETS": False,
            "COLUMN_SETS": False,
            "entries": (256, 256),
            "bits": (8, 8),
            "FINAL": False,
        },
        numbers={
            "m": 3,
            "k": 104,
            "width": 37,
            "rows": 37,
            "columns": columns,
            "words": 0,
            "span": columns,
        },
        grid=(2, 3, 1),
        threads=32,
    )


@pytest.mark.parametrize("length", [4, 8])
def test_a_kernel_of_the_package(length: int) -> None:
    x, books = numbers(3, 104).half(), numbers(2, 256, length, seed=1).half()
    random = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (37, 104 // length, 2), generator=random, dtype=torch.uint8)
    weight = sum(books[s].double()[codes[..., s].long()] for s in range(2)).view(37, 104)
    programs = {layout: naive(layout, length) for layout in ("cells", "planes", "columns")}
    build_programs(list(programs.values()))
    laid_out = {
        "cells": codes,
        "planes": codes.permute(2, 0, 1).contiguous(),
        "columns": codes.permute(2, 1, 0).contiguous(),
    }
    for layout, program in programs.items():
        out = torch.empty(3, 37)
        tensors = {"x": x, "codes": laid_out[layout], "books": books, "out": out}
        report = run_program(program, tensors)
        report.check()
        torch.testing.assert_close(out.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-4)
        assert report.total("global_store") == out.nbytes
        # each code once a token
        by_width = {s.width: s.bytes for s in report.sites if s.file.endswith("linear.cuh")}
        assert by_width[1] == 3 * codes.nbytes
