"""The whole gate in real processes, on commits of a repository: slow, so among the sweeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vqkernels
from tests.bench.gate.test_process import WORKLOAD
from tests.bench.gate.test_sides import git

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.sweep


@pytest.fixture
def repository(tmp_path) -> Path:
    """A commit of the kernels as they are."""
    place = tmp_path / "repository"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(vqkernels.__file__).parent, place / "vqkernels", ignore=ignored)
    git(place, "init", "-b", "main")
    git(place, "add", ".")
    git(place, "commit", "-m", "kernels")
    (tmp_path / "tiny.toml").write_text(WORKLOAD, encoding="utf-8")
    return place


def command(repository: Path, *words: str) -> list[str]:
    selection = ["-w", str(repository.parent / "tiny.toml"), "-k", "torch/dequant", "-m", "1"]
    options = ["--pairs", "3", "--time", "0.05", "--results", str(repository.parent / "results")]
    gate = [sys.executable, "-P", "-m", "bench.cli", "gate"]
    return [*gate, "--baseline", "HEAD", *selection, *options, *words]


def environment(repository: Path) -> dict[str, str]:
    data = str(repository.parent / "data")
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": data}


def run(repository: Path, *words: str) -> tuple[int, dict]:
    report = repository.parent / "report.json"
    done = subprocess.run(
        [*command(repository, *words), "--json", str(report)],
        cwd=repository,
        env=environment(repository),
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text(encoding="utf-8"))


def change(repository: Path, old: str, new: str) -> None:
    file = repository / "vqkernels" / "kernels" / "torch" / "dequant.py"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_a_comment_is_identical_and_a_delay_is_a_regression(repository):
    change(repository, "SPACE = Space()", "# a comment\nSPACE = Space()")
    code, report = run(repository)
    assert (code, report["counts"]) == (0, {"IDENTICAL": 1})
    change(
        repository,
        "KERNEL = Kernel(",
        "import time\n\n\ndef late(config, problem, device, honest=compile):\n"
        "    run = honest(config, problem, device)\n\n"
        "    def slow(packed, x, out):\n"
        "        run(packed, x, out)\n"
        "        time.sleep(0.02)\n\n"
        "    return slow\n\n\ncompile = late\n\nKERNEL = Kernel(",
    )
    code, report = run(repository)
    assert (code, report["counts"]) == (1, {"REGRESSED": 1})
    (outcome,) = report["outcomes"]
    assert outcome["pairs"] == 6
    change(repository, "time.sleep(0.02)", "out.zero_()")
    code, report = run(repository)
    assert code == 3
    assert "incorrect" in report["outcomes"][0]["reason"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_gate_that_is_ended_goes_on(repository, number):
    results = repository.parent / "results"
    process = subprocess.Popen(
        command(repository),
        cwd=repository,
        env=environment(repository),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not (files := list(results.rglob("*.jsonl"))) or files[0].stat().st_size < 1000:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(60)
    code, report = run(repository, "--resume", str(files[0]))
    assert (code, report["counts"]) == (0, {"IDENTICAL": 1}), report["outcomes"][0]["reason"]
    assert report["outcomes"][0]["pairs"] == 3
    assert list(results.rglob("*.jsonl")) == files
