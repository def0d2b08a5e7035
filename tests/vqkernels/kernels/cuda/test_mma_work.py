"""What cuda/mma says that it does: against the harness's counters and against machine code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autotune.inspection import inspect_kernel, stand_in
from tests.cuda import harness
from tests.vqkernels.kernels.cuda.test_kernels import HOPPER
from vqkernels.device import known_device
from vqkernels.kernels.access import gather_wavefronts
from vqkernels.kernels.cuda import mma, product
from vqkernels.kernels.cuda.mma_work import Chunk
from vqkernels.kernels.cuda.tiles import Tiling
from vqkernels.presets import parse_format
from vqkernels.problem import Problem
from vqkernels.space import Config, Value
from vqkernels.tensor import random_tensor

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

H100 = known_device("h100")


def problem(name: str = "rq-2x256x8", m: int = 16, n: int = 4096, k: int = 4096) -> Problem:
    return Problem(m=m, n=n, k=k, spec=parse_format(name), dtype="float16")


def config(asked: Problem, **changes: Value) -> Config:
    return mma.default(asked, HOPPER).replace(**changes)


SMALL = problem(n=256, k=1024)
SMALL_CONFIG = config(
    SMALL, variant="b", tokens=16, replicas=1, warps=4, warps_k=2, splits=1, depth=1
)


@pytest.fixture(scope="module")
def report() -> harness.Report:
    (program,) = mma.programs(SMALL_CONFIG, SMALL)
    tensor = random_tensor(SMALL.spec, SMALL.n, SMALL.k, seed=1)
    packed = mma.pack(tensor, SMALL_CONFIG, SMALL)
    x = torch.randn(SMALL.m, SMALL.k, generator=torch.Generator().manual_seed(0)).half()
    out = torch.empty(SMALL.m, SMALL.n, dtype=torch.float16)
    found = harness.run_program(program, {**product.arrays_of(packed), "x": x, "out": out})
    found.check()
    return found


def total(report: harness.Report, kind: str, wanted: Callable[[harness.Site], bool]) -> int:
    return sum(s.wavefronts for s in report.sites if s.kind == kind and wanted(s))


def test_wavefronts_are_the_harness_own(report: harness.Report) -> None:
    """Of gathers with their conflicts, of filling and of exchanged sums; the rest is in lines."""
    (said,) = mma.work(SMALL_CONFIG, SMALL, HOPPER)
    shared = sum(s.wavefronts for s in report.sites if s.kind.startswith("shared"))
    # 16 bytes a lane are 4 wavefronts: codes, x (which one warp in 16 reads) and the codebooks
    wide = [s for s in report.sites if s.kind == "global_load" and s.width == 16]
    assert said.wavefronts == pytest.approx(shared + sum(4 * s.requests for s in wide), rel=0.03)
    gathers = total(report, "shared_load", lambda s: "gather" in s.file)
    codes = 2 * 256 * 128
    assert gathers == pytest.approx(gather_wavefronts(16, 32, 256) * codes / 32, rel=0.03)


def test_sums_that_warps_exchange(report: harness.Report) -> None:
    stored = total(report, "shared_store", lambda s: s.file.endswith("mma.cuh"))
    alone = SMALL_CONFIG.replace(warps_k=1)
    shared, own = (mma.work(one, SMALL, HOPPER)[0] for one in (SMALL_CONFIG, alone))
    # a block of four warps fills the codebooks for two tiles of theirs, or for four
    fills = 2 * (shared.blocks - own.blocks) * 2 * 256 * 16 / 128
    assert shared.wavefronts - own.wavefronts == 2 * stored + fills > 0


def test_mma_and_codes_are_counted_once() -> None:
    """32 tokens are two passes' gathers, and one pass's with twice the products."""
    asked = problem(m=32)
    two, one = (
        mma.work(config(asked, variant="b", tokens=t, splits=1, combine="mma"), asked, H100)[0]
        for t in (16, 32)
    )
    assert two.tensor_flops == one.tensor_flops == 2 * 2 * 32 * 4096 * 4096
    assert two.hbm_bytes == one.hbm_bytes  # the second pass's codes are in L2
    assert 1.7 < two.wavefronts / one.wavefronts < 2


def test_bytes_are_multiplied_twice_at_twice_the_rate() -> None:
    spec = {**parse_format("rq-2x256x8").to_dict(), "codebook_dtype": "int8"}
    asked = Problem(m=8, n=4096, k=4096, spec=type(SMALL.spec).from_dict(spec), dtype="float16")
    works = mma.work(config(asked, variant="bytes", tokens=8, splits=1), asked, H100)
    (product_,) = (work for work in works if work.tensor_flops)
    assert product_.tensor_dtype == "int8"
    assert product_.tensor_flops == 2 * 2 * 2 * 8 * 4096 * 4096
    assert len(works) > 10  # launches of torch around it


def test_entries_that_no_block_holds_come_from_l2() -> None:
    asked = problem("aqlm-1x16", m=1, k=1024)  # x of a token fits the L1 beside hot entries too
    cold, warm = (mma.work(config(asked, hot_entries=h), asked, H100)[0] for h in (0, 12288))
    cells = 4096 * 128
    assert cold.l2_bytes > 32 * cells
    fills = warm.blocks * 12288 * 16
    assert cold.l2_bytes - (warm.l2_bytes - fills) == pytest.approx(32 * cells * 12288 / 65536)


CHOICES: tuple[dict[str, Value], ...] = (
    {"variant": "b", "tokens": 16, "combine": "mma"},
    {"variant": "b", "tokens": 32, "combine": "hadd2"},
    {"variant": "a", "tokens": 8, "combine": "mma"},
    {"variant": "split", "tokens": 4, "combine": "mma"},
)


@pytest.mark.parametrize("name", ["aqlm-2x8", pytest.param("aqlm-1x16", marks=pytest.mark.sweep)])
def test_instructions_of_a_chunk(name: str) -> None:
    pytest.importorskip("triton", reason="nvdisasm comes with Triton")
    asked, device = problem(name), stand_in("sm_90")
    for changes in CHOICES:
        chosen = mma.default(asked, device).replace(**changes)
        (found,) = inspect_kernel(mma.KERNEL, asked, "sm_90", chosen)
        assert found.code is not None, found.reason
        said, depth = Chunk(Tiling(chosen, asked)), chosen.number("depth")
        assert said.instructions == pytest.approx(found.code.loop.instructions / depth, rel=0.1)
        assert said.mma == sum(found.code.loop.tensor.values()) / depth


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["rq-4x256x8", "vptq-65536-256", "pq-m8", "vq-256x32"])
def test_instructions_of_other_formats(name: str) -> None:
    test_instructions_of_a_chunk(name)
