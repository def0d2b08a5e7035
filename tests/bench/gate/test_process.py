"""Real processes: what they find, and what becomes of those that die."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vqkernels
from autotune.bandwidth import Bandwidth
from autotune.timers import Budget
from bench.gate import process
from bench.gate.inputs import load_subject, place, prepare
from bench.gate.job import ABSENT, BEGIN, Job, Target
from bench.gate.process import Process, measure
from bench.gate.sides import Side, running, write_harness
from vqkernels.errors import BackendError
from vqkernels.kernel import registry

WORKLOAD = """
about = "for tests"
source = "none"
blocks = 1
[[layer]]
name = "small"
n = 64
k = 32
"""

# A kernel as torch/dequant, but for what it does when it is compiled.
PLANTED = """
import dataclasses, os, signal, time
from vqkernels.kernels.torch import dequant
def compile(config, problem, device):
    {action}
    return dequant.KERNEL.compile(config, problem, device)
KERNEL = dataclasses.replace(dequant.KERNEL, name="{name}", compile=compile)
"""


def a_target(folder: Path, kernel: str) -> Target:
    file = folder / "tiny.toml"
    file.write_text(WORKLOAD, encoding="utf-8")
    return Target(
        source=str(file),
        fused=False,
        workload="tiny",
        layer="small",
        format="rq-2x256x8",
        rows=(64,),
        k=32,
        m=1,
        dtype="float32",
        kernel=kernel,
    )


@pytest.fixture
def job(tmp_path) -> Job:
    folder = tmp_path / "job"
    folder.mkdir()
    threads = torch.get_num_threads()
    prepare(folder, [a_target(tmp_path, "torch/dequant")], "cpu", threads, 0)
    return Job(
        targets=(a_target(tmp_path, "torch/dequant"),),
        folder=str(folder),
        device="cpu",
        threads=threads,
        seed=0,
        budget=Budget(seconds=0, warmup_s=0, min_samples=7, max_samples=7),
        cold=False,
        bandwidth=Bandwidth(1e12, 1e12, 1),
        configs={},
    )


@pytest.fixture
def planted(tmp_path) -> Side:
    """A checkout whose kernels die, hang, or are there at all."""
    root = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(vqkernels.__file__).parent, root / "vqkernels", ignore=ignored)
    kernels = root / "vqkernels" / "kernels" / "torch"
    dies = "os.kill(os.getpid(), signal.SIGSEGV)"
    for name, action in (("dies", dies), ("sleeps", "time.sleep(600)"), ("ours", "pass")):
        text = PLANTED.format(name=name, action=action)
        (kernels / f"{name}.py").write_text(text, encoding="utf-8")
    python = sys.executable
    return Side(what="planted", python=python, path=(str(root),), root=str(root))


def alone(side: Side, job: Job, harness: str) -> Process:
    """One side's process, as for a stored baseline."""
    return measure({"candidate": side}, job, harness)["candidate"]


def test_a_process_measures_its_own_sides_code(tmp_path, job, planted):
    """One that dies costs its case alone; what is behind it runs in a further process."""
    names = ("torch/dies", "torch/ours", "torch/dequant")
    job = dataclasses.replace(job, targets=tuple(a_target(tmp_path, name) for name in names))
    harness = write_harness(tmp_path / "harness")
    found = alone(planted, job, harness)
    died, ours, dequant = found.measured
    assert (died.measurement.status, died.measurement.reason) == (
        "runtime",
        "its process was ended by SIGSEGV",
    )
    assert ours.measurement.status == dequant.measurement.status == "ok", ours.measurement.reason
    assert len(ours.measurement.samples_s) == 7
    assert ours.facts["source"] == dequant.facts["source"], "of one folder"
    assert dequant.facts["source"] != registry()["torch/dequant"].source_hash
    assert ours.state["before"] and ours.state["after"]
    assert found.device["kind"] == "cpu"
    assert not list(Path(job.folder).glob("*.job.json")), "nothing is left behind"
    lost = alone(running(), dataclasses.replace(job, targets=job.targets[1:2]), harness)
    assert lost.measured[0].measurement.reason == ABSENT


@pytest.mark.sweep
def test_a_process_that_hangs_is_ended(tmp_path, job, planted, monkeypatch):
    monkeypatch.setattr(process, "START_S", 8.0)
    monkeypatch.setattr(process, "STEP_S", 8.0)
    job = dataclasses.replace(job, targets=(a_target(tmp_path, "torch/sleeps"),))
    (hung,) = alone(planted, job, write_harness(tmp_path / "harness")).measured
    assert hung.measurement.status == "timeout"
    assert "not done after 8 s" in hung.measurement.reason


def test_other_code_than_the_sides_own_is_never_compared(tmp_path, job):
    harness = write_harness(tmp_path / "harness")
    side = dataclasses.replace(running(), what="side", root=str(tmp_path))
    with pytest.raises(BackendError, match=r"side: its process found vqkernels in .*, not in"):
        alone(side, job, harness)
    broken = tmp_path / "broken" / "vqkernels"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('older than this harness')")
    side = dataclasses.replace(side, path=(str(broken.parent),))
    with pytest.raises(
        BackendError, match=r"can't measure: .*ImportError: older than this harness"
    ):
        alone(side, job, harness)
    with pytest.raises(BackendError, match="can't be started"):
        alone(dataclasses.replace(side, python="/no/python"), job, harness)


def test_a_gate_that_is_killed_leaves_no_process(tmp_path, job, planted):
    """The child ends with its parent, also where that could do nothing any more."""
    job = dataclasses.replace(job, targets=(a_target(tmp_path, "torch/sleeps"),))
    file, out = tmp_path / "job.json", tmp_path / "out"
    file.write_text(job.to_json(), encoding="utf-8")
    harness = write_harness(tmp_path / "harness")
    parent = (
        "import os, subprocess, sys, time\n"
        "_, ask = os.pipe()\n"
        "answer, go = os.pipe()\n"
        "os.write(go, b'gg')\n"
        "words = [sys.executable, '-P', '-m', 'bench.gate.measure', *sys.argv[1:]]\n"
        "pipes = (ask, answer)\n"
        "child = subprocess.Popen([*words, *map(str, pipes)], pass_fds=pipes)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([harness, *planted.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(file), str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    until = time.monotonic() + 60
    while not (out.exists() and "begin" in out.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert _alive(child) and "begin" in out.read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(child)


class Stub:
    """A runner that asks for what a test wrote, and tells what it was granted."""

    def __init__(self, name: str, wants: str, told: list[str]) -> None:
        self.name, self._coming, self._told = name, list(wants), told
        self.wants: bytes | None = BEGIN

    @property
    def in_case(self) -> bool:
        return self.wants not in (None, BEGIN)

    def go(self) -> None:
        self._told.append(f"{self.name} {self.wants.decode() if self.wants else 'new'}")

    def hear(self) -> None:
        self.wants = self._coming.pop(0).encode()


@pytest.mark.parametrize(
    ("first", "second", "granted"),
    [
        ("ttdb", "ttdb", "A b, B b, A t, B t, A t, B t, A d, B d"),
        # the second waits with its post-checks until the first has all of its samples
        ("tttdb", "tdb", "A b, B b, A t, B t, A t, A t, A d, B d"),
        # what has failed before it was timed waits for the next case
        ("b", "tdb", "A b, B b, B t, B d"),
        # a floor that is measured once more, after the last turn
        ("tdtdb", "tdb", "A b, B b, A t, B t, A d, B d, A t, A d"),
    ],
)
def test_sides_take_turns_and_nothing_else_runs_beside_one(first, second, granted):
    told: list[str] = []
    process._case([Stub("A", first, told), Stub("B", second, told)])  # type: ignore[list-item]
    assert ", ".join(told) == granted


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_inputs_are_the_same_for_every_process(tmp_path, job):
    (case,) = job.targets
    first = load_subject(Path(job.folder), case, place("cpu", job.threads), 0)
    again = Job.from_json(job.to_json())
    assert again == job
    assert torch.equal(first.tensor.parts["codes"], first.tensor.parts["codes"])
    assert (Path(job.folder) / case.weight).exists()
    assert (Path(job.folder) / case.answers).exists()
