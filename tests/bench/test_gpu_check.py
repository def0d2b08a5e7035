"""gpu-check without a GPU: tasks in Triton's interpreter and on a CPU, conduct with fakes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import bench.commands.gpu_check as command
from autotune.bandwidth import Bandwidth
from autotune.measurement import Correctness, Measurement, Timing
from autotune.timers import Budget, set_threads
from autotune.workers import Outcome
from bench import gpu_check, gpu_tasks
from bench.cli import cli
from bench.goals import goal_lines
from bench.gpu_tasks import Conformance, Site, Timed, conform, measure, prepare
from bench.records import RecordFile, read_records
from bench.workload import Layer, Workload
from tests.autotune import zoo
from tests.interpreter import DEVICE, interpreted_kernels
from vqkernels.device import detect_cpu
from vqkernels.errors import BackendError
from vqkernels.kernel import registry

ROOT = Path(gpu_check.__file__).parents[1]
INTERPRETER = Site(device=DEVICE, place="cpu", small=True)
CPU = Site(device=dataclasses.replace(detect_cpu(1), llc_bytes=1 << 16), small=True)
QUICK = Budget(warmup_s=0, seconds=0, min_samples=2, max_samples=2)
HEADER = {
    "device": {"name": "Test"},
    "bandwidth": {"median": 1e12, "best": 1e12, "nbytes": 1},
}
LAYERS = (
    Layer(name="q", n=64, k=96),
    Layer(name="up", n=128, k=64),
    Layer(name="v", n=64, k=96),
    Layer(name="small", n=40, k=64),
)
LATER = 1e12


def kernels(*names):
    interpreted_kernels()  # mends the interpreter's bf16
    return tuple(gpu_tasks.all_kernels()[name] for name in names)


def plan(site=CPU, checked=(), timed=(), **fields):
    return gpu_check.Plan(
        **{
            "site": site,
            "checked": kernels(*checked),
            "timed": kernels(*timed),
            "workload": Workload(name="tiny", about="", source="", blocks=1, layers=LAYERS),
            "formats": ("rq-2x8x8",),
            "ms": (1, 3),
            "tokens": ((1, "float32"), (3, "float32")),
            "dtype": "float32",
            "jobs": 1,
            "budget": QUICK,
            **fields,
        }
    )


@pytest.fixture(autouse=True)
def threads():
    """Tasks take a thread each; run here, they must give them back."""
    before = torch.get_num_threads()
    yield
    set_threads(before)


class InlinePool:
    """Runs tasks where it stands; `fate` may say how one ends instead."""

    fate = staticmethod(lambda task: None)

    def __init__(self, jobs, limit_s):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, tasks, until=None):
        for task in tasks:
            if until is not None and time.monotonic() >= until:
                yield Outcome(task, "unstarted", reason="the time for the run was over")
            elif (fate := InlinePool.fate(task)) is not None:
                yield Outcome(task, *fate)
            else:
                yield Outcome(task, "done", task.function(*task.arguments))


@pytest.fixture
def inline(monkeypatch):
    """Tasks run here, and end as the list's function says."""
    monkeypatch.setattr(gpu_check, "Pool", InlinePool)
    monkeypatch.setattr(InlinePool, "fate", staticmethod(lambda task: None))

    def set_fate(function):
        monkeypatch.setattr(InlinePool, "fate", staticmethod(function))

    return set_fate


@pytest.fixture
def few(monkeypatch):
    """Two formats to check instead of all."""
    chosen = {name: gpu_tasks.formats(True)[name] for name in ("aqlm-2x8", "out-stride")}
    monkeypatch.setattr(gpu_check, "formats", lambda small: chosen)


def collect(tmp_path, make):
    with RecordFile(tmp_path, HEADER, "gpu-check") as file:
        records = list(make(file))
    if records:
        assert read_records(file.path) == [json.loads(json.dumps(one)) for one in records]
    return records


# Tasks


@pytest.mark.parametrize("kernel", ["triton/mma", "triton/dequant", "torch/dequant"])
def test_a_gpu_kernel_is_checked_at_each_m_and_dtype(kernel):
    kernels(kernel)
    tokens = ((1, "float16"), (2, "float16"), (17, "bfloat16"))
    task = Conformance(site=INTERPRETER, kernel=kernel, case="aqlm-2x8", tokens=tokens)
    results = conform(task)
    assert [(case.m, case.dtype) for case, *_ in results] == list(tokens)
    assert [case for case, *_ in results] == task.cases()
    for case, measured, _ in results:
        assert measured.status == "checked", measured
        assert all(measured.correctness.controls.values())
        assert (case.kernel, case.format, case.workload) == (kernel, "aqlm-2x8", "conformance")


def test_what_a_kernel_refuses_costs_no_reference(monkeypatch):
    monkeypatch.setattr(gpu_tasks, "make_subject", lambda *_, **__: pytest.fail("made"))
    task = Conformance(
        site=INTERPRETER, kernel="triton/mma", case="length-3", tokens=((1, "float16"),)
    )
    ((_, measured, _),) = conform(task)
    assert measured.status == "constraint"
    assert "vectors of 3" in measured.reason


def test_every_case_has_a_task_for_every_kernel():
    tasks = plan(INTERPRETER, checked=("triton/mma", "torch/table")).parallel()
    pairs = {(one.arguments[0].kernel, one.arguments[0].case) for one in tasks}
    assert pairs == {(k, c) for k in ("triton/mma", "torch/table") for c in gpu_tasks.formats(True)}


def timed(*names, layers=LAYERS[:1], **fields):
    return Timed(
        **{
            "site": CPU,
            "workload": "tiny",
            "format": "rq-2x8x8",
            "layers": layers,
            "kernels": names,
            "m": 3,
            "dtype": "float32",
            "timers": ("perf_counter",),
            "budget": QUICK,
            **fields,
        }
    )


def test_a_layer_is_timed_and_its_record_complete():
    ((case, measured, state),) = measure(timed("numba/table"))
    assert (measured.status, measured.timing.timer) == ("ok", "perf_counter")
    assert (case.layer, case.n, case.k, case.kernel) == ("q", 64, 96, "numba/table")
    assert case.effective_bits > 0
    assert set(state) == {"before", "after"}
    assert not case.steps


def test_a_block_is_its_layers_and_says_which_kernel_each_had():
    names = ("numba/table", "torch/dequant", "numba/table", "torch/dense")
    ((case, measured, _),) = measure(timed(*names, layers=LAYERS, name="best"))
    assert measured.status == "ok"
    assert measured.flops > sum(2 * 3 * one.n * one.k for one in LAYERS[1::2])
    assert (case.layer, case.n, case.k, case.kernel) == ("block", None, None, "best")
    assert [step["kernel"] for step in case.steps] == list(names)
    assert [step["layer"] for step in case.steps] == ["q", "up", "v", "small"]


def test_compiling_ahead_takes_what_the_timing_will_launch(monkeypatch):
    seen = []
    kernel = zoo.make_kernel(
        compile=lambda config, problem, device: lambda *_: seen.append((problem, config)),
    )
    refusing = zoo.make_kernel(supports=lambda *_: "a limit of 4 entries", name="refusing")
    monkeypatch.setattr(
        gpu_tasks, "all_kernels", lambda: {"test/fake": kernel, "test/refusing": refusing}
    )
    tall = Layer(name="tall", n=4096, k=64)
    assert prepare((timed("test/fake"), timed("test/fake", layers=(tall,)))) == 2
    assert [(one.m, one.n, one.k) for one, _ in seen] == [(3, 64, 96), (3, 1024, 64)]
    assert prepare((timed("test/refusing"),)) == 0


# Correctness


def test_real_workers_check_interpreted_and_other_kernels(tmp_path, few):
    both = plan(
        INTERPRETER, checked=("triton/mma", "torch/dequant"), tokens=((2, "float16"),), jobs=2
    )
    records = collect(tmp_path, lambda file: gpu_check.correctness(both, file, LATER))
    assert len(records) == 4
    assert {one["status"] for one in records} == {"checked"}
    assert {(one["kernel"], one["layer"]) for one in records} == {
        (kernel, case)
        for kernel in ("triton/mma", "torch/dequant")
        for case in ("aqlm-2x8", "out-stride")
    }


@pytest.mark.parametrize(
    ("fate", "status"),
    [
        (("died", None, "the process was ended by SIGSEGV"), "runtime"),
        (("raised", None, "ValueError: no"), "runtime"),
        (("timeout", None, "not done after 120 s"), "timeout"),
    ],
)
def test_a_lost_task_is_run_again_one_m_at_a_time(tmp_path, inline, few, fate, status):
    def lost(task):
        one = task.arguments[0]
        bad = one.case == "out-stride" and 3 in [m for m, _ in one.tokens]
        return fate if bad else None

    inline(lost)
    one = plan(checked=("torch/dequant",))
    records = collect(tmp_path, lambda file: gpu_check.correctness(one, file, LATER))
    found = {(r["layer"], r["m"]): (r["status"], r["reason"]) for r in records}
    assert len(records) == 4
    assert found.pop(("out-stride", 3)) == (status, fate[2])
    assert set(found.values()) == {("checked", "")}


def test_what_the_time_does_not_reach_is_recorded_as_not_run(tmp_path, inline, few):
    one = plan(checked=("torch/dequant", "torch/table"))
    records = collect(tmp_path, lambda file: gpu_check.correctness(one, file, time.monotonic() - 1))
    assert len(records) == 2 * 2 * 2
    assert {one["status"] for one in records} == {"timeout"}
    assert all(one["reason"].startswith("not run: ") for one in records)


# Timing


def test_layers_and_blocks_are_timed_shape_by_shape(tmp_path, inline):
    one = plan(timed=("torch/dense", "torch/dequant", "numba/table"), ms=(1,))
    records = collect(tmp_path, lambda file: gpu_check.timing(one, FAST, file, LATER))
    assert {record["status"] for record in records} == {"ok"}
    order = [(record["layer"], record["kernel"]) for record in records]
    names = ["torch/dense", "torch/dequant", "numba/table"]
    # smallest first, q for v too, then the blocks
    assert order[:9] == [(layer, name) for layer in ("small", "q", "up") for name in names]
    assert order[9:] == [("block", name) for name in (*names, "best")]
    best = records[-1]
    medians = {(r["layer"], r["kernel"]): sorted(r["samples_s"]) for r in records[:9]}
    for step in best["steps"]:
        layer = {"v": "q"}.get(step["layer"], step["layer"])
        mine = sum(medians[layer, step["kernel"]])
        assert mine == min(sum(medians[layer, name]) for name in names[1:])


FAST = Bandwidth(1e18, 1e18, 1)


def test_a_kernel_too_slow_on_a_small_layer_is_not_tried_on_larger_ones(tmp_path, inline):
    slow = dataclasses.replace(QUICK, longest_call_s=0.0)
    one = plan(timed=("torch/dense",), ms=(1, 3), budget=slow)
    records = collect(tmp_path, lambda file: gpu_check.timing(one, FAST, file, LATER))
    by_m = [[r for r in records if r["m"] == m] for m in (1, 3)]
    for group in by_m:  # m = 3 starts anew
        assert [r["layer"] for r in group] == ["small", "q", "up", "block"]
        assert {r["status"] for r in group} == {"constraint"}
        assert group[0]["reason"].startswith("right, but a call takes")
        assert all(r["reason"].startswith("not tried: 40x64") for r in group[1:3])
        assert group[3]["reason"].startswith("q: not tried: 40x64")


def test_a_block_with_a_bad_layer_is_not_timed_and_says_why(tmp_path, inline):
    def lost(task):
        (one,) = task.arguments
        mine = one.kernels[0] == "torch/dequant" and one.layers[0].name == "up"
        return ("died", None, "the process was ended by SIGKILL") if mine else None

    inline(lost)
    one = plan(timed=("torch/dense", "torch/dequant", "numba/table"), ms=(1,))
    records = collect(tmp_path, lambda file: gpu_check.timing(one, FAST, file, LATER))
    blocks = {r["kernel"]: r for r in records if r["layer"] == "block"}
    assert blocks["torch/dequant"]["status"] == "runtime"
    assert blocks["torch/dequant"]["reason"] == "up: the process was ended by SIGKILL"
    assert blocks["best"]["status"] == "ok"
    assert blocks["best"]["steps"][1]["kernel"] == "numba/table"


def test_the_baseline_and_the_peers_are_never_our_best(tmp_path, inline):
    one = plan(timed=("torch/dense", "aqlm/numba"), ms=(1,), formats=("aqlm-2x8",))
    records = collect(tmp_path, lambda file: gpu_check.timing(one, FAST, file, LATER))
    assert {r["kernel"] for r in records if r["layer"] == "block"} == {"torch/dense", "aqlm/numba"}


def fusing(**fields):
    workload = dataclasses.replace(plan().workload, together={"qv": ("q", "v")})
    return plan(timed=("torch/dense", "torch/dequant", "numba/table"), workload=workload, **fields)


def test_layers_of_one_input_are_timed_as_one_too(tmp_path, inline):
    one = fusing(ms=(1, 128))
    records = collect(tmp_path, lambda file: gpu_check.timing(one, FAST, file, LATER))
    fused = [r for r in records if r["layer"] == "qv"]
    assert {r["m"] for r in fused} == {1}, "many tokens hide a launch"
    found = {r["kernel"]: (r["status"], r["n"], r["spec"]["group_size"]) for r in fused}
    assert found == {"torch/dequant": ("ok", 128, 64), "numba/table": ("constraint", 128, 64)}
    (block,) = [r for r in records if r["kernel"] == gpu_check.FUSED]
    assert (block["status"], block["m"]) == ("ok", 1)
    assert [step["layer"] for step in block["steps"]] == ["qv", "up", "small"]
    assert block["steps"][0]["kernel"] == "torch/dequant"


def test_a_format_that_can_not_be_fused_costs_only_that(tmp_path, inline):
    layers = (Layer(name="q", n=60, k=96), Layer(name="v", n=64, k=96))
    workload = Workload(
        name="t", about="", source="", blocks=1, layers=layers, together={"qv": ("q", "v")}
    )
    one = plan(timed=("torch/dequant",), workload=workload, formats=("toy-16-4",), ms=(1,))
    told = []
    records = collect(tmp_path, lambda file: gpu_check.timing(one, FAST, file, LATER, told.append))
    assert [r["layer"] for r in records] == ["q", "v", "block", "block"]
    assert any("not fused: a weight of 60 rows" in line for line in told)


# Goals


def block(kernel, seconds, name="aqlm-2x8", m=1, **fields):
    measured = Measurement(
        status="ok",
        samples_s=(seconds,) * 3,
        timing=Timing(timer="cuda_graph", warmup_s=0, copies=2, cache={}),
        correctness=Correctness(worst=0, max_abs=0, relative_rms=0, controls={}),
    )
    case = {"layer": "block", "format": name, "m": m, "kernel": kernel, "steps": []}
    case["workload"] = "llama3-70b"
    return {**case, **measured.to_dict(), **fields}


OURS = block("best", 1e-4) | {"steps": [{"kernel": "triton/mma"}, {"kernel": "cuda/table"}]}


@pytest.mark.parametrize(
    ("dense", "aqlm", "ends"),
    [
        (5.01e-4, 2.51e-4, ["goal 5: met", "goal 2.5: met"]),
        (4.99e-4, 2.49e-4, ["goal 5: missed", "goal 2.5: missed"]),
    ],
)
def test_goals_are_met_or_missed(dense, aqlm, ends):
    lines = goal_lines([OURS, block("torch/dense", dense), block("aqlm/cuda", aqlm)])
    assert [line.partition("; ")[2] for line in lines] == ends
    assert all("100.0 us (triton/mma+cuda/table)" in line for line in lines)


def test_ours_is_the_faster_of_fused_and_not():
    fused = block("best-fused", 0.8e-4) | {"steps": [{"kernel": "cuda/table"}]}
    (line,) = goal_lines([OURS, fused, block("torch/dense", 4.1e-4)])
    assert line.startswith("block aqlm-2x8 m=1: 80.0 us (cuda/table, fused), 5.12 x")
    wrong = fused | {"status": "incorrect", "reason": "qkv: wrong", "samples_s": []}
    (line,) = goal_lines([wrong, OURS, block("torch/dense", 4.1e-4)])
    assert line.startswith("block aqlm-2x8 m=1: 100.0 us (triton/mma+cuda/table), 4.10 x")


@pytest.mark.parametrize(("rate", "end"), [(1.3e12, "met"), (1.4e12, "missed")])
def test_one_token_is_held_to_memorys_rate(rate, end):
    (line,) = goal_lines([OURS | {"moved_bytes": 10**8, "bandwidth": {"best": rate}}])
    assert line == f"block aqlm-2x8 m=1: {1e12 / rate:.0%} of memory's rate; goal 75%: {end}"


@pytest.mark.parametrize(("seconds", "end"), [(1.89e-4, "met"), (1.91e-4, "missed")])
def test_eight_tokens_are_held_to_one(seconds, end):
    (line,) = goal_lines([OURS, block("best", seconds, m=8)])
    ratio = seconds / 1e-4
    assert line.endswith(f"m=8: {ratio:.2f} x the time of one token; goal at most 1.9: {end}")


@pytest.mark.parametrize(("seconds", "end"), [(3.9e-5, "met"), (4.1e-5, "missed")])
def test_a_small_models_block_has_a_time_of_its_own(seconds, end):
    (line,) = goal_lines([block("best", seconds) | {"workload": "llama3-8b"}])
    assert line == f"block aqlm-2x8 m=1: {seconds * 1e6:.1f} us; goal 40 us: {end}"


def test_a_prompts_goal_is_a_share_of_the_baseline():
    ours = OURS | {"m": 2048}
    (line,) = goal_lines([ours, block("torch/dense", 0.79e-4, m=2048)])
    assert line.startswith("block aqlm-2x8 m=2048: 100.0 us")
    assert "0.79 x" in line
    assert line.endswith("goal 0.8: missed")


def test_a_goal_without_both_sides_is_no_ratio():
    failed = {"status": "incorrect", "reason": "up: wrong", "samples_s": []}
    (line,) = goal_lines([OURS, block("torch/dense", 1.0, **failed)])
    assert line.endswith("no ratio to the dense product: the dense product: up: wrong")
    (line,) = goal_lines([block("torch/dense", 1.0)])
    assert "no kernel has all layers" in line
    refused = {"status": "constraint", "reason": "AQLM has no such format", "samples_s": []}
    lines = goal_lines([OURS, block("torch/dense", 1.0), block("aqlm/cuda", 1.0, **refused)])
    assert len(lines) == 1


# The command


@pytest.fixture
def run(monkeypatch, tmp_path, inline, few):
    monkeypatch.setattr(command, "detect", lambda kind: CPU.device)
    monkeypatch.setattr(gpu_check, "default_tokens", lambda device: ((2, "float32"),))
    monkeypatch.setattr(gpu_check, "BUDGET", QUICK)
    monkeypatch.setattr(gpu_check, "measured_bandwidth", lambda device: FAST)
    path = tmp_path / "tiny.toml"
    rows = "".join(f'[[layer]]\nname="{one.name}"\nn={one.n}\nk={one.k}\n' for one in LAYERS)
    path.write_text(f'about="a"\nsource="b"\nblocks=1\n{rows}', encoding="utf-8")

    def invoke(*words):
        line = ["gpu-check", "--device", "cpu", "-w", str(path), "-f", "rq-2x8x8", "-m", "1"]
        return CliRunner().invoke(cli, [*line, "--results", str(tmp_path / "results"), *words])

    return invoke


def written(tmp_path):
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    assert path.name.endswith("-gpu-check.jsonl")
    assert path.parent.name == CPU.device.slug
    return read_records(path)


def test_the_command_checks_times_and_tells(run, tmp_path):
    done = run("-k", "torch/dequant")
    assert done.exit_code == 0, done.output
    records = written(tmp_path)
    assert [one["status"] for one in records[:2]] == ["checked"] * 2
    kinds = {(one["workload"], one["kernel"]) for one in records}
    assert kinds == {
        ("conformance", "torch/dequant"),
        ("tiny", "torch/dense"),
        ("tiny", "torch/dequant"),
        ("tiny", "best"),
    }
    assert done.stdout.count("block") == 3
    assert "goal 5: " in done.stderr
    assert "records: " in done.stderr
    assert "FAILED" not in done.stderr


@pytest.mark.parametrize(
    ("part", "workloads"), [("correctness", {"conformance"}), ("timing", {"tiny"})]
)
def test_one_part_alone(run, tmp_path, part, workloads):
    assert run("-k", "torch/dequant", "--only", part).exit_code == 0
    assert {one["workload"] for one in written(tmp_path)} == workloads


def test_a_wrong_kernel_is_exit_code_1_with_its_reason(run, inline, tmp_path):
    inline(lambda task: ("died", None, "gone") if task.function is conform else None)
    done = run("-k", "torch/dequant", "--only", "correctness")
    assert done.exit_code == 1
    assert "FAILED aqlm-2x8 aqlm-2x8 m=2 float32 torch/dequant: runtime: gone" in done.stderr


def test_time_that_is_over_is_told_counted_and_exit_code_1(run, tmp_path):
    done = run("-k", "torch/dequant", "--minutes", "0")
    assert done.exit_code == 1
    records = written(tmp_path)
    assert f"{len(records)} cases not run: the time was over" in done.stderr
    assert "FAILED" not in done.stderr


def test_without_a_gpu_one_line_says_what_to_do(run, monkeypatch):
    done = CliRunner().invoke(cli, ["gpu-check"])
    assert isinstance(done.exception, BackendError)
    assert "needs an NVIDIA GPU" in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_gpu_checks_half_precision_at_all_m():
    tokens = gpu_check.default_tokens(DEVICE)
    assert [m for m, dtype in tokens if dtype == "float16"] == [1, 2, 4, 8, 16, 64, 256, 2048]
    assert [m for m, dtype in tokens if dtype == "bfloat16"] == [1, 16]
    assert gpu_check.Plan.timers.fget(plan(INTERPRETER)) == ("cuda_event", "cuda_graph")


def test_the_real_command_on_this_machine(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(
        'about="a"\nsource="b"\nblocks=1\n[[layer]]\nname="q"\nn=40\nk=64\n', encoding="utf-8"
    )
    line = [sys.executable, "-W", "error", "-m", "bench.cli", "gpu-check", "--device", "cpu"]
    options = ["-w", str(path), "-f", "rq-2x8x8", "-m", "1", "-k", "torch/dequant"]
    folder = ["--results", str(tmp_path / "results"), "--only", "timing", "-o", "jsonl"]
    done = subprocess.run(
        [*line, *options, *folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in done.stdout.splitlines()]
    assert [row["kernel"] for row in rows if row["layer"] == "block"] == [
        "torch/dense",
        "torch/dequant",
        "best",
    ]
    (file,) = (tmp_path / "results").rglob("*-gpu-check.jsonl")
    assert len(read_records(file)) == len(rows)
    assert registry()["torch/dense"].id == rows[0]["kernel"]
