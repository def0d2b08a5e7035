"""cuda/table on the CPU: every way through it, extreme activations, banks, and its machine code."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune import cubin, sass
from autotune.cubin import read_cubin
from autotune.inspection import ARCHS
from autotune.sass import Instruction
from tests.cuda import harness
from vqkernels import oracle
from vqkernels.device import Device, detect_cpu
from vqkernels.kernel import registry
from vqkernels.presets import PRESETS, parse_format
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor
from vqkernels.testing import prepare

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

from vqkernels.kernels.cuda import around, compiler, product, table, table_shape
from vqkernels.kernels.cuda.program import Program

KERNEL = registry()["cuda/table"]
HOPPER = dataclasses.replace(
    detect_cpu(), kind="cuda", name="harness", arch="sm_90", units=4, shared_bytes=227 << 10
)
AMPERE = dataclasses.replace(HOPPER, arch="sm_80")
BASE = Config(
    tokens=1,
    warps=4,
    blocks=1,
    build="mma",
    regions=1,
    split="workspace",
    splits=1,
    ring=0,
    ahead=0,
    dependent=True,
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A shape and format, and how BASE is changed for it."""

    format: str | CodebookSpec
    n: int
    k: int
    m: int
    config: dict[str, Any]
    dtype: Dtype = "float16"
    device: Device = HOPPER

    @property
    def spec(self) -> CodebookSpec:
        return parse_format(self.format) if isinstance(self.format, str) else self.format

    @property
    def problem(self) -> Problem:
        return Problem(m=self.m, n=self.n, k=self.k, spec=self.spec, dtype=self.dtype)

    @property
    def chosen(self) -> Config:
        return BASE.replace(**self.config)

    def inputs(self) -> Tensor:
        x = torch.randn(self.m, self.k, generator=torch.Generator().manual_seed(self.m))
        return x.to(self.problem.torch_dtype)


def launched(
    trial: Trial, x: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Tensor, oracle.Reference, list[harness.Report]]:
    """The output, what it should be, and what each launch did; raises on any fault."""
    assert KERNEL.supports(trial.problem, trial.device) is None
    reports: list[harness.Report] = []

    def launcher(program: Program, device: Device) -> Any:
        def launch(tensors: dict[str, Tensor]) -> None:
            bulk = device is HOPPER
            chosen = {"counting": False, **options}
            reports.append(harness.run_program(program, tensors, bulk_copies=bulk, **chosen))
            reports[-1].check()

        return launch

    for module in (product, around):
        monkeypatch.setattr(module, "Launcher", launcher)
    tensor = random_tensor(trial.spec, trial.n, trial.k, seed=1, fit=False)
    run, packed = prepare(KERNEL, trial.problem, trial.device, tensor, trial.chosen)
    out = torch.full((trial.m, trial.n), float("nan"), dtype=x.dtype)
    run(packed, x, out)
    return out, oracle.reference(tensor, x), reports


def verdict(out: Tensor, expected: oracle.Reference, trial: Trial) -> oracle.Check:
    rounded = KERNEL.rounds_to(trial.problem)
    return oracle.check(out, expected, weights=rounded, chain=KERNEL.half_chain)


def grouped(**fields: Any) -> CodebookSpec:
    return CodebookSpec(vector_length=8, stages=(256, 200), **fields)


# 150 columns of codes: two tiles of 64 and a part of one, four of 32 and a part of one.
CLUSTERED = Trial(
    "rq-2x256x8", 75, 1200, 1, {"blocks": 2, "split": "cluster", "splits": 2, "ring": 2}
)
PAIRED = Trial("rq-2x256x8", 300, 1200, 2, {"tokens": 2, "blocks": 2, "splits": 2, "ahead": 4})
FOURFOLD = Trial(
    "rq-3x256x8", 40, 1200, 3, {"tokens": 4, "split": "cluster", "splits": 4, "ring": 3}
)
CORE = (
    CLUSTERED,
    PAIRED,
    FOURFOLD,
    Trial("rq-4x256x8", 40, 1200, 5, {"tokens": 2, "splits": 2, "ahead": 8}, device=AMPERE),
    Trial("vq-256x32", 40, 1632, 1, {"build": "fma"}),
    Trial("pq-m8", 40, 1664, 2, {"tokens": 2}),
    Trial(grouped(group_axis="row", group_size=96), 300, 520, 1, {"split": "cluster", "splits": 2}),
)
REST = (
    Trial("rq-3x256x8", 200, 1200, 1, {"blocks": 4, "ring": 2}),
    Trial("rq-4x256x8", 40, 808, 4, {"tokens": 4, "regions": 3}, "bfloat16"),
    Trial("vq-256x4", 40, 600, 2, {"tokens": 2, "build": "fma"}),
    Trial("vq-256x4", 40, 600, 1, {}),
    Trial("vq-100x12", 40, 1212, 2, {"tokens": 2}),
    Trial("vq-256x16", 40, 1616, 1, {"split": "cluster", "splits": 2}, "bfloat16"),
    Trial("vq-256x32", 40, 1632, 4, {"tokens": 4}),
    Trial("pq-m16", 40, 1200, 1, {"ring": 4}),
    Trial(grouped(group_axis="row", group_size=64), 300, 520, 2, {"tokens": 2, "blocks": 4}),
    Trial(grouped(group_axis="column", group_size=208), 40, 1200, 1, {}),
)


def build(trials: Sequence[Trial]) -> None:
    """Compile what the trials launch, together."""
    for gpu in (HOPPER, AMPERE):
        found = [p for t in trials if t.device is gpu for p in table.programs(t.chosen, t.problem)]
        harness.build_programs(found, bulk_copies=gpu is HOPPER)


def right(trials: Sequence[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    build(trials)
    wrong = []
    for number, trial in enumerate(trials):
        out, expected, _ = launched(trial, trial.inputs(), monkeypatch, seed=number % 4)
        if not (found := verdict(out, expected, trial)).passed:
            wrong.append(f"{trial}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def programs() -> None:
    build(CORE)


def test_right(monkeypatch: pytest.MonkeyPatch) -> None:
    right(CORE, monkeypatch)


@pytest.mark.sweep
def test_the_rest_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    right(REST, monkeypatch)


@pytest.mark.parametrize("trial", [CLUSTERED, PAIRED, FOURFOLD], ids=["m1", "m2", "m3"])
def test_every_order_of_threads_gives_the_same_bits(trial, programs, monkeypatch) -> None:
    x = trial.inputs()
    outs = [launched(trial, x, monkeypatch, seed=seed)[0] for seed in harness.ORDERS]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("trial", [CLUSTERED, PAIRED, FOURFOLD], ids=["m1", "m2", "m3"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 6e4 / 4.5])
def test_extreme_activations(trial: Trial, scale: float, programs, monkeypatch) -> None:
    out, expected, _ = launched(trial, trial.inputs() * scale, monkeypatch)
    if scale > 1:  # y itself is beyond fp16
        out, expected = out.float(), oracle.Reference(expected.y.half().double(), *_rest(expected))
    assert verdict(out, expected, trial).passed


def _rest(expected: oracle.Reference) -> tuple[Tensor, int]:
    return expected.spread, expected.depth


def test_tokens_of_very_different_size(programs, monkeypatch) -> None:
    """Each has a factor of its own: the largest leaves the smallest its precision."""
    trial = dataclasses.replace(FOURFOLD, m=4, dtype="bfloat16")
    x = trial.inputs() * torch.tensor([1e-36, 1.0, 3e35, 1e-3])[:, None].bfloat16()
    out, expected, _ = launched(trial, x, monkeypatch)
    assert verdict(out, expected, trial).passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("trial", [PAIRED, FOURFOLD], ids=["m2", "m3"])
def test_a_bad_token_stays_alone(trial: Trial, bad: float, programs, monkeypatch) -> None:
    x = trial.inputs()
    x[1, 777] = bad
    out, expected, _ = launched(trial, x, monkeypatch)
    assert not torch.isfinite(out[1]).any()
    others = [token for token in range(trial.m) if token != 1]
    rest = oracle.Reference(expected.y[others], expected.spread[others], expected.depth)
    assert verdict(out[others], rest, trial).passed


def test_zeros(programs, monkeypatch) -> None:
    out, _, _ = launched(CLUSTERED, torch.zeros(1, CLUSTERED.k).half(), monkeypatch)
    assert not out.any()


# ------------------------------------------------------------------------------------------------
# machine code


# A lookup's address: a byte of codes between bytes of the lane's place.
LOOKUP = re.compile(r"0x76[0-3]4\b")


def looking_up(code: list[Instruction]) -> list[Instruction]:
    """The loop that looks words up, or, where no loop is left of it, the stretch that does."""
    loop = sass.hot_loop(code)
    if any(LOOKUP.search(one.operands) for one in loop):
        return [one for one in loop if one.guard not in ("!PT", "!UPT")]
    at = [i for i, one in enumerate(code) if LOOKUP.search(one.operands)]
    sums = [i for i, one in enumerate(code) if re.match(r"HMMA.*\.F32", one.opcode)]
    return code[min(at) : max(sums) + 1]


def lean(arch: str, m: int, format: str = "aqlm-2x8", side: int = 4096) -> None:
    """The default for an architecture: no spills, and few instructions around each lookup."""
    pytest.importorskip("triton", reason="Triton's wheel carries nvdisasm")
    device = ARCHS[arch.removesuffix("a")]
    problem = Problem(m=m, n=side, k=side, spec=parse_format(format), dtype="float16")
    (program,) = table.programs(table.default(problem, device), problem)
    image = compiler.compile_text(program.text(), arch.removeprefix("sm_")).cubin
    assert read_cubin(image).spill_bytes == 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [cubin.tool("nvdisasm"), "--print-code", "--no-dataflow", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = looking_up(sass.functions(listing)["vq_kernel"])
    words = sum(LOOKUP.search(one.operands) is not None for one in found)
    assert words >= 32
    assert sum(one.name == "HMMA" for one in found) == words / (2 if m > 2 else 4)
    assert len(found) <= (3.0 if m > 2 else 2.7) * words


@pytest.mark.parametrize(("arch", "m"), [("sm_80", 1), ("sm_90a", 1), ("sm_90a", 2)])
def test_lookups_are_lean(arch: str, m: int) -> None:
    lean(arch, m)


@pytest.mark.sweep
@pytest.mark.parametrize("side", [4096, 8192])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_lookups_are_lean_everywhere(arch: str, m: int, side: int) -> None:
    lean(arch, m, side=side)


# ------------------------------------------------------------------------------------------------
# banks and bytes


@pytest.mark.parametrize("trial", [CLUSTERED, PAIRED, FOURFOLD], ids=["m1", "m2", "m3"])
def test_no_bank_conflicts(trial: Trial, programs, monkeypatch) -> None:
    """Neither lookups nor the tensor cores' build ever meet in a bank."""
    _, _, (report, *_) = launched(trial, trial.inputs(), monkeypatch, counting=True)
    lookups = [s for s in report.sites if s.kind == "shared_load" and "words" in s.file]
    builds = [s for s in report.sites if s.kind == "shared_store" and "build" in s.file]
    width = 8 if trial.config.get("tokens") == 4 else 4
    assert {site.width for site in lookups} == {width}
    assert sum(site.wavefronts for site in lookups) == sum(site.ideal for site in lookups) > 0
    tables = [site for site in builds if site.width == width]
    assert sum(site.wavefronts for site in tables) == sum(site.ideal for site in tables) > 0


def test_codes_are_read_once_each(programs, monkeypatch) -> None:
    """Whole sectors; through registers, a warp reads one unit more than there are."""
    for trial in (CLUSTERED, PAIRED):
        _, _, (report, *_) = launched(trial, trial.inputs(), monkeypatch, counting=True)
        read = [s for s in report.sites if s.file.endswith("table.cuh") and "global" in s.kind]
        codes = [s for s in read if s.kind == "global_bulk_copy" or s.width == 16]
        blocks, spans = trial.chosen.number("blocks"), trial.chosen.number("splits")
        warps = -(-trial.n // (32 * blocks)) * spans
        past = 0 if trial.chosen.number("ring") else warps * blocks * 1024
        padded = table_shape.codes_bytes(trial.chosen, trial.problem) - max(
            blocks * 1024, trial.chosen.number("ahead") << 10
        )
        assert sum(site.bytes for site in codes) == padded + past
        assert sum(site.sectors for site in codes) * 32 == padded + past


@pytest.mark.parametrize("trial", [CLUSTERED, PAIRED, FOURFOLD], ids=["m1", "m2", "m3"])
def test_work_is_what_the_text_does(trial: Trial, programs, monkeypatch) -> None:
    """Wavefronts of lookups, codes and builds, and bytes of codes; blocks as launched."""
    _, _, (report, *_) = launched(trial, trial.inputs(), monkeypatch, counting=True)
    assert KERNEL.work is not None
    one = KERNEL.work(trial.chosen, trial.problem, HOPPER)[0]
    (program,) = table.programs(trial.chosen, trial.problem)
    assert one.blocks == math.prod(program.grid)
    shared = report.total("shared", "wavefronts")
    codes = [s for s in report.sites if s.kind == "global_load" and s.width == 16]
    shared += sum(4 * site.requests for site in codes if "table.cuh" in site.file)
    assert one.wavefronts == pytest.approx(shared, rel=0.1)
    moved = sum(32 * site.sectors for site in report.sites if site.kind.startswith("global"))
    assert one.l2_bytes == pytest.approx(moved, rel=0.35)


def test_packing_keeps_words_in_range() -> None:
    """No entry's L1 norm exceeds 8, so that 2^15 bounds every word; nothing else is rounded."""
    for scale in (1e-4, 1.0, 300.0):
        tensor = random_tensor(PRESETS["rq-2x256x8"], 40, 400, seed=1, fit=False)
        books = {f"codebook_{s}": tensor.parts[f"codebook_{s}"] * scale for s in range(2)}
        tensor = tensor.replace_parts(**books)
        packed = table.pack(tensor, BASE, CLUSTERED.problem)
        largest = packed["books"].float().abs().sum(dim=2).max()
        assert 4.0 <= largest <= 8.0
        exact = torch.cat([book.float() for book in books.values()], dim=2).flatten(0, 1)
        error = (packed["books"].float() * packed["scales"] - exact).abs()
        assert error.max() <= 2**-25 * packed["scales"], "of what is too small for fp16 alone"


@pytest.mark.parametrize(
    ("format", "dtype", "reason"),
    [
        ("toy-16-4", "float16", "vectors along out"),
        ("vq-512x8", "float16", "512 entries"),
        ("vq-256x9", "float16", "vectors of 9"),
        ("rq-2x256x8", "float32", "float32 activations"),
        ("vq-256x8-channel", "bfloat16", "every 1 rows"),
    ],
)
def test_refusals_name_the_limit(format: str, dtype: Dtype, reason: str) -> None:
    problem = Problem(m=1, n=512, k=1152, spec=parse_format(format), dtype=dtype)
    assert reason in (KERNEL.supports(problem, HOPPER) or "")
