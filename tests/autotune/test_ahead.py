"""Compilation ahead: in time, in other processes, on other cores, and its failures are outcomes."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from autotune.ahead import Ahead, Cores, divide
from autotune.inspection import stand_in
from autotune.trial import Processes, Recipe
from tests.autotune import zoo
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config

GPU = stand_in("sm_90")
PROBLEM = Problem(m=1, n=64, k=64, spec=PRESETS["rq-2x256x8"], dtype="float16")
OURS = frozenset(os.sched_getaffinity(0))
NAME = "tests.autotune.test_ahead:KERNEL"


@dataclasses.dataclass(frozen=True)
class Written:
    """A program that leaves a file where it is compiled, or fails to."""

    config: Config

    def compile(self, arch: int) -> None:
        if self.config["how"] == "fail":
            raise ValueError(f"no such thing on {arch}")
        if self.config["how"] == "crash":
            os.abort()
        time.sleep(float(self.config["seconds"]))
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        with Path(str(self.config["path"])).open("a", encoding="utf-8") as file:
            file.write(f"{arch} {os.getpid()} {cores}\n")


KERNEL = dataclasses.replace(
    zoo.make_kernel(), programs=lambda config, problem: (Written(config), Written(config))
)


def config(tmp_path, number=0, how="write", seconds=0.0) -> Config:
    return Config(path=str(tmp_path / f"{number}.txt"), how=how, seconds=seconds)


def test_what_was_told_is_compiled_once_in_another_process(tmp_path):
    one = config(tmp_path)
    core = frozenset([min(OURS)])
    with Ahead(PROBLEM, GPU, core, 60.0) as ahead:
        ahead.tell([(NAME, one)])
        ahead.tell([(NAME, one)])
        assert ahead.outcome(NAME, one).status == "done"
        assert ahead.outcome(NAME, one).steps_s["compile"] >= 0
    lines = (tmp_path / "0.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2  # the programs of one config
    arch, pid, cores = lines[0].split()
    assert (arch, cores) == ("90", str(min(OURS)))
    assert int(pid) != os.getpid()


def test_what_is_asked_for_comes_before_what_only_may_be(tmp_path):
    many = [config(tmp_path, number, seconds=0.05) for number in range(40)]
    with Ahead(PROBLEM, GPU, frozenset([min(OURS)]), 60.0) as ahead:
        ahead.tell([(NAME, one) for one in many])
        assert ahead.outcome(NAME, many[-1]).status == "done"
        assert len(list(tmp_path.iterdir())) < 10


def test_nothing_is_compiled_ahead_without_cores_for_it(tmp_path):
    one = config(tmp_path)
    with Ahead(PROBLEM, GPU, frozenset(), 60.0) as ahead:
        ahead.tell([(NAME, one)])
        assert ahead.outcome(NAME, one) is None
    assert not (tmp_path / "0.txt").exists()


def test_what_nobody_told_of_is_not_waited_for(tmp_path):
    with Ahead(PROBLEM, GPU, OURS, 60.0) as ahead:
        assert ahead.outcome(NAME, config(tmp_path)) is None


@pytest.mark.parametrize(
    ("how", "limit_s", "status", "reason"),
    [
        ("fail", 60.0, "compile", "ValueError: no such thing on 90"),
        ("crash", 60.0, "compile", "the process was ended by SIGABRT"),
        ("hang", 1.0, "timeout", "compile: not done after 1 s"),
    ],
)
def test_a_failure_is_the_attempts_and_the_next_compiles(
    tmp_path, monkeypatch, how, limit_s, status, reason
):
    """As a search on a GPU meets it; the attempt never reaches the process that times."""
    monkeypatch.setattr(Recipe, "where", lambda self: GPU)
    monkeypatch.setattr("autotune.trial.divide", lambda device: Cores(OURS, OURS))
    monkeypatch.setattr("autotune.trial.Pool.run", lambda *_: pytest.fail("the attempt was made"))
    recipe = Recipe(spec=PROBLEM.spec, n=64, k=64, m=1, dtype="float16")
    limits = {"subject": 60.0, "compile": limit_s, "check": 60.0, "time": 60.0}
    bad, good = config(tmp_path, how=how, seconds=600.0), config(tmp_path, 1)
    with Processes(recipe, limits=limits) as processes:
        processes.coming([(NAME, bad), (NAME, good)])
        measured, _ = processes.measure(NAME, bad)
        assert (measured.status, measured.reason) == (status, reason)
        assert processes._ahead.outcome(NAME, good).status == "done"


def test_a_cpu_times_on_all_cores_and_compiles_on_none():
    assert divide(zoo.DEVICE) == Cores(OURS)


def test_a_gpu_leaves_two_cores_to_what_is_timed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 9})
    assert divide(GPU) == Cores(frozenset([3, 4]), frozenset([5, 9]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert divide(GPU) == Cores(frozenset([3, 4]))
