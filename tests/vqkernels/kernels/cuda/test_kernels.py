"""The CUDA kernels' own text on the CPU, against the oracle and under every check of the harness.

The core runs each kernel on each format; the sweep adds layouts, configs at random, m, dtypes, the
path of GPUs before sm_90, and more orders of threads.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.cuda import harness
from vqkernels import oracle
from vqkernels.device import Device, detect_cpu
from vqkernels.kernel import Kernel, registry
from vqkernels.kernels.cuda.program import Program
from vqkernels.presets import PRESETS
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.testing import Case, check_case, conformance_cases, prepare

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

KERNELS = {k.id: k for k in registry().kernels.values() if k.backend == "cuda"}


def device(arch: str) -> Device:
    """A small GPU, so that defaults split k and blocks go on over rows."""
    return dataclasses.replace(
        detect_cpu(), kind="cuda", name="harness", arch=arch, units=4, shared_bytes=227 << 10
    )


HOPPER, AMPERE = device("sm_90"), device("sm_80")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A kernel on a case, in a config (the default where None)."""

    kernel: str
    case: Case
    m: int
    dtype: Dtype = "float16"
    config: Config | None = None
    device: Device = HOPPER
    seed: int = 0

    def __str__(self) -> str:
        config = self.config or {}
        chosen = ",".join(f"{name}={value}" for name, value in config.items())
        return f"{self.kernel}-{self.case}-m{self.m}-{self.dtype}-{self.device.arch}-{chosen}"

    @property
    def problem(self) -> Problem:
        one = self.case
        return Problem(m=self.m, n=one.n, k=one.k, spec=one.spec, dtype=self.dtype, bias=one.bias)

    @property
    def refused(self) -> bool:
        kernel = KERNELS[self.kernel]
        if kernel.supports(self.problem, self.device):
            return True
        config = self.config or kernel.default(self.problem, self.device)
        shared = kernel.footprint(config, self.problem, self.device).shared_bytes
        assert self.device.shared_bytes is not None
        return shared > self.device.shared_bytes


def small_cases() -> list[Case]:
    """Every format on a small ragged matrix."""
    return [case.small() for case in conformance_cases()]


def wide(case: Case, codes: int) -> Case:
    """Few rows, and columns of codes for every lane of a warp, `codes` each, with a ragged tail."""
    spec = case.spec
    if spec.rotation_size:
        return case
    columns = 32 * codes + 21
    along_in = spec.vector_axis == "in"
    block = spec.vector_length * spec.stride
    k = spec.side_columns + (columns * spec.vector_length - 3 if along_in else columns)
    return dataclasses.replace(case, n=11 if along_in else 2 * block + 5, k=k)


# ------------------------------------------------------------------------------------------------
# running them


class Recorder:
    """Stands in for Launcher to learn which programs a run launches; launches nothing."""

    found: list[Program]

    def __init__(self, program: Program, _: Device) -> None:
        self.program = program

    def __call__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.found.append(self.program)
        for name in self.program.writes:
            tensors[name].zero_()


def launched(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that a trial launches."""
    kernel, problem = KERNELS[trial.kernel], trial.problem
    recorder = type("One", (Recorder,), {"found": []})
    use(recorder, monkeypatch)
    run, packed = prepare(kernel, problem, trial.device, trial.case.tensor, trial.config)
    x = torch.zeros(trial.m, trial.case.k, dtype=problem.torch_dtype)
    run(packed, x, torch.empty(trial.m, trial.case.n, dtype=x.dtype))
    return list(recorder.found)


def use(launcher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every kernel launch by it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vqkernels.kernels.cuda.") and hasattr(module, "Launcher"):
            monkeypatch.setattr(module, "Launcher", launcher)


def build(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile what all trials launch, many kernels a unit."""
    for gpu in (HOPPER, AMPERE):
        programs = [
            program
            for trial in trials
            if trial.device is gpu and not trial.refused
            for program in launched(trial, monkeypatch)
        ]
        harness.build_programs(programs, bulk_copies=gpu is HOPPER)


def check(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> bool:
    """False where the kernel refuses; AssertionError where it is wrong or does wrong."""
    if trial.refused:
        return False
    options = {"seed": trial.seed, "counting": False}
    use(harness.launcher(**options), monkeypatch)
    return check_case(
        KERNELS[trial.kernel],
        trial.device,
        trial.case,
        trial.m,
        dtype=trial.dtype,
        config=trial.config,
        place="cpu",
    )


def run_all(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many trials each kernel passed; raises with every one that failed."""
    build(trials, monkeypatch)
    passed, wrong = dict.fromkeys(KERNELS, 0), []
    for trial in trials:
        try:
            passed[trial.kernel] += check(trial, monkeypatch)
        except AssertionError as error:
            wrong.append(f"{trial} (seed {trial.seed}): {error}")
    assert not wrong, "\n".join(wrong[:10])
    return passed


# ------------------------------------------------------------------------------------------------
# trials


def core(kernel: str) -> list[Trial]:
    """Each format once, in the default config, forward or in reverse."""
    return [Trial(kernel, case, 3, seed=i % 2) for i, case in enumerate(small_cases())]


def layouts(kernel: str) -> list[Trial]:
    """Each format in each layout of the kernel, with 4, 8 and 16 bytes a load where it has them."""
    space = {param.name: param.values for param in KERNELS[kernel].space.params}
    loads = space.get("load_bytes", (None,))
    trials = []
    for case, layout, load in itertools.product(small_cases(), space["layout"], loads):
        trial = Trial(kernel, case, 2)
        if trial.refused:
            continue
        change = {"layout": layout} | ({} if load is None else {"load_bytes": load})
        config = KERNELS[kernel].default(trial.problem, HOPPER).replace(**change)
        if KERNELS[kernel].space.broken(config) is None:
            gpu = AMPERE if len(trials) % 2 else HOPPER
            trials.append(dataclasses.replace(trial, config=config, device=gpu))
    return trials


def sampled(kernel: str, count: int, seed: str = "") -> Iterator[Trial]:
    """Configs of the whole space at random, on wide cases, with other m, dtypes and orders."""
    rng = random.Random(zlib.crc32((kernel + seed).encode()))
    cases = itertools.cycle(conformance_cases())
    space = KERNELS[kernel].space
    while count:
        config = Config(**{p.name: rng.choice(p.values) for p in space.params})
        if space.broken(config):
            continue
        # at most as many codes as a lane takes in any config, so that every lane has some
        case = wide(next(cases), int(config.get("load_bytes", 1)))
        trial = Trial(
            kernel,
            case,
            rng.choice((1, 2, 5, 9)),
            dtype=rng.choice(("float16", "bfloat16", "float32")),
            config=config,
            device=rng.choice((HOPPER, AMPERE)),
            seed=rng.randrange(2, 1000),
        )
        if not trial.refused:
            count -= 1
            yield trial


def passes(kernel: str) -> int:
    """Formats that the core passes: staged holds only what fits its shared memory."""
    return sum(not trial.refused for trial in core(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_core(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = run_all(core(kernel), monkeypatch)
    # table takes byte codes along k and 16-bit activations alone
    assert passed[kernel] == passes(kernel) > (25 if kernel == "cuda/table" else 30)


@pytest.mark.parametrize("kernel", KERNELS)
def test_core_of_the_whole_space(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 15 if kernel == "cuda/table" else 40  # its text takes g++ three times as long
    assert run_all(list(sampled(kernel, count)), monkeypatch)[kernel] == count


LAID_OUT = [
    name for name, one in KERNELS.items() if any(p.name == "layout" for p in one.space.params)
]


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", LAID_OUT)
def test_every_layout(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = layouts(kernel)
    assert run_all(trials, monkeypatch)[kernel] == len(trials)


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_whole_space(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_all(list(sampled(kernel, 400, "sweep")), monkeypatch)[kernel] == 400


# ------------------------------------------------------------------------------------------------
# what must not pass, and what is counted


CONTROL = Case("control", PRESETS["rq-2x256x8"], 11, 405)


@pytest.mark.parametrize("kernel", KERNELS)
def test_damaged_weights_are_seen(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every negative control of a packed weight: one code, one entry, one stage."""
    one = KERNELS[kernel]
    problem = Problem(m=2, n=CONTROL.n, k=CONTROL.k, spec=CONTROL.spec, dtype="float16")
    build([Trial(kernel, CONTROL, 2)], monkeypatch)
    use(harness.launcher(counting=False), monkeypatch)
    run, packed = prepare(one, problem, HOPPER, CONTROL.tensor)
    x = torch.randn(2, CONTROL.k, generator=torch.Generator().manual_seed(5)).half()
    expected = oracle.reference(CONTROL.tensor, x)
    rounded = one.rounds_to(problem)

    def passed() -> bool:
        out = torch.full((2, CONTROL.n), float("nan"), dtype=x.dtype)
        run(packed, x, out)
        return oracle.check(out, expected, weights=rounded).passed

    assert passed()
    for name, at in (("codes", 4), ("books", 8 * int(CONTROL.tensor.parts["codes"][0, 0, 0]))):
        array = packed[name].view(-1)
        kept = array.clone()
        array[at] = array[at] + 1
        assert not passed(), f"a changed element of {name} passes"
        array.copy_(kept)
    packed["books"][:, 256:] = 0
    assert not passed(), "a dropped stage passes"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_stays_with_its_token(kernel, bad, monkeypatch) -> None:
    problem = Problem(m=3, n=CONTROL.n, k=CONTROL.k, spec=CONTROL.spec, dtype="float16")
    build([Trial(kernel, CONTROL, 3)], monkeypatch)
    use(harness.launcher(counting=False), monkeypatch)
    run, packed = prepare(KERNELS[kernel], problem, HOPPER, CONTROL.tensor)
    x, out = torch.ones(3, CONTROL.k).half(), torch.empty(3, CONTROL.n).half()
    x[1, 7] = bad
    run(packed, x, out)
    finite = torch.isfinite(out)
    assert finite[0].all()
    assert finite[2].all()
    assert not finite[1].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_order_of_threads_gives_the_same_bits(kernel, monkeypatch) -> None:
    case = Case("aligned", CONTROL.spec, CONTROL.n, 400)
    problem = Problem(m=2, n=case.n, k=case.k, spec=case.spec, dtype="float16")
    build([Trial(kernel, case, 2)], monkeypatch)
    x, outs = torch.randn(2, case.k).half(), []
    for seed in harness.ORDERS:
        use(harness.launcher(counting=False, seed=seed), monkeypatch)
        run, packed = prepare(KERNELS[kernel], problem, HOPPER, case.tensor)
        outs.append(torch.empty(2, case.n).half())
        run(packed, x, outs[-1])
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_more_tokens_than_a_grid_holds() -> None:
    problem = Problem(m=65_536, n=CONTROL.n, k=CONTROL.k, spec=CONTROL.spec, dtype="float16")
    refusals = {name: kernel.supports(problem, HOPPER) for name, kernel in KERNELS.items()}
    assert refusals.pop("cuda/dequant") is None
    assert all(text and text.startswith("65,536 tokens") for text in refusals.values())


def test_views_that_begin_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(m=1, n=CONTROL.n, k=400, spec=CONTROL.spec, dtype="float16")
    tensor = random_tensor(CONTROL.spec, CONTROL.n, 400, fit=False)
    use(harness.launcher(counting=False), monkeypatch)
    run, packed = prepare(KERNELS["cuda/fused_rq"], problem, HOPPER, tensor)
    longer = torch.randn(1, 401).half()
    x, out = longer[:, 1:], torch.empty(1, CONTROL.n).half()
    run(packed, x, out)
    assert oracle.check(out, oracle.reference(tensor, x), weights="float16").passed


def sites(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> harness.Report:
    """The counters of a trial's product."""
    reports: list[harness.Report] = []

    def launcher(program: Program, _: Device) -> Callable[[dict[str, torch.Tensor]], None]:
        def launch(tensors: dict[str, torch.Tensor]) -> None:
            report = harness.run_program(program, tensors)
            report.check()
            if program.kernel not in ("prologue", "epilogue"):
                reports.append(report)

        return launch

    use(launcher, monkeypatch)
    kernel: Kernel = KERNELS[trial.kernel]
    run, packed = prepare(kernel, trial.problem, trial.device, trial.case.tensor, trial.config)
    x = torch.randn(trial.m, trial.case.k).to(trial.problem.torch_dtype)
    run(packed, x, torch.empty(trial.m, trial.case.n, dtype=x.dtype))
    (report,) = reports
    return report


def staged(replicas: int, gather_bytes: int = 16) -> Trial:
    case = Case("aligned", PRESETS["rq-2x256x8"], 16, 2048)
    trial = Trial("cuda/staged", case, 1)
    config = KERNELS["cuda/staged"].default(trial.problem, HOPPER)
    changes = {"replicas": replicas, "gather_bytes": gather_bytes, "splits": 1}
    return dataclasses.replace(trial, config=config.replace(**changes))


def test_replicas_end_bank_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random codes meet 2.5 ways in one copy of 16-byte entries, and never in eight."""
    one, eight = (sites(staged(count), monkeypatch) for count in (1, 8))
    ideal = one.total("shared_load", "ideal")
    assert one.total("shared_load", "wavefronts") > 1.8 * ideal
    assert eight.total("shared_load", "wavefronts") == eight.total("shared_load", "ideal") == ideal


def test_filling_copies_has_no_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    report = sites(staged(8), monkeypatch)
    assert report.total("shared_store", "wavefronts") == report.total("shared_store", "ideal")


def test_codes_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("aligned", PRESETS["rq-2x256x8"], 16, 2048)
    trial = Trial("cuda/vectorized", case, 1)
    report = sites(trial, monkeypatch)
    (codes,) = [site for site in report.sites if site.width == 8]
    assert codes.bytes == 16 * 256 * 2
    assert codes.sectors * 32 == codes.bytes, "whole sectors"


def test_hot_entries_serve_the_most_used_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the codes name entry 900: with one in 1,024 at hand, it is among them."""
    spec = PRESETS["aqlm-1x16"]
    tensor = random_tensor(spec, 16, 2048, fit=False)
    codes = tensor.parts["codes"].int()
    codes[:, ::2] = 900
    used = tensor.replace_parts(codes=codes.to(tensor.parts["codes"].dtype))
    case = Case("skewed", spec, 16, 2048)
    object.__setattr__(case, "tensor", used)
    trial = Trial("cuda/vectorized", case, 1)
    config = KERNELS["cuda/vectorized"].default(trial.problem, HOPPER)
    config = config.replace(hot_entries=1024)
    report = sites(dataclasses.replace(trial, config=config), monkeypatch)
    assert report.total("shared_load", "lanes") > 0.5 * codes.numel()
    assert check(dataclasses.replace(trial, config=config), monkeypatch)


def test_renumbering_by_use_keeps_the_weight() -> None:
    from vqkernels.kernels.cuda.vectorized import by_use

    for name in ("rq-2x256x8", "vq-256x8-channel", "pq-m8", "aqlm-1x16"):
        tensor: QuantizedTensor = random_tensor(PRESETS[name], 16, 512, fit=False)
        again = by_use(tensor)
        assert torch.equal(again.decode(), tensor.decode())
        counts = torch.bincount(again.parts["codes"][..., 0].flatten().int())
        assert torch.equal(counts, counts.sort(descending=True).values)
