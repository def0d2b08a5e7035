"""`vqbench gate` and `vqbench selfcheck` as commands: exit codes, outputs, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import junitparser
import pytest
from click.testing import CliRunner

from bench.cli import cli
from bench.gate import asked
from bench.gate.noise import load
from tests.bench.gate.fakes import Fake, install, target, wrong
from vqkernels.device import detect_cpu
from vqkernels.errors import ConfigError, ContainerError

CASES = ("numba/one", "numba/two")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Nothing of the machine's own: its noise, its handlers, its folder."""
    monkeypatch.setenv("VQBENCH_NOISE", str(tmp_path / "noise.json"))
    monkeypatch.setattr(asked.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def run(*words: str):
    return CliRunner().invoke(cli, ["gate", "--device", "cpu", "--threads", "2", *words])


def gate(monkeypatch, fake: Fake, *words: str):
    install(monkeypatch, fake, tuple(target(kernel) for kernel in fake.ratios))
    return run("--baseline", "base", *words)


@pytest.mark.parametrize(
    ("ratio", "words", "code", "said"),
    [
        (1.0, (), 0, "PASS"),
        (0.9, (), 0, "FASTER"),
        (1.1, (), 1, "REGRESSED"),
        (wrong("incorrect"), (), 3, "WRONG"),
        (lambda number: 0.7 + number % 5 / 7, (), 0, "INCONCLUSIVE"),
        (lambda number: 0.7 + number % 5 / 7, ("--strict",), 4, "INCONCLUSIVE"),
    ],
)
def test_exit_codes(monkeypatch, ratio, words, code, said):
    done = gate(monkeypatch, Fake({"numba/one": ratio, "numba/two": 1.0}), *words)
    assert done.exit_code == code, done.output
    assert said in done.stdout


def test_a_baseline_that_fails_is_no_verdict(monkeypatch):
    done = gate(monkeypatch, Fake({"numba/one": 1.0}, base=wrong("runtime")))
    assert done.exit_code == 4
    assert "INVALID" in done.stdout


def test_what_could_have_been_seen_is_named(monkeypatch):
    fake = Fake({"numba/one": lambda number: 0.7 + number % 5 / 7})
    assert "would have been called" in gate(monkeypatch, fake).stdout


def test_all_outputs_of_one_call(monkeypatch, tmp_path):
    files = {form: tmp_path / f"report.{form}" for form in ("md", "junit", "json")}
    words = [word for form, path in files.items() for word in (f"--{form}", str(path))]
    fake = Fake({"numba/one": 1.1, "numba/two": 1.0})
    done = gate(monkeypatch, fake, *words)
    assert done.exit_code == 1
    assert "| numba/one" in files["md"].read_text(encoding="utf-8").replace("numba/one |", "") or (
        "numba/one" in files["md"].read_text(encoding="utf-8")
    )
    report = json.loads(files["json"].read_text(encoding="utf-8"))
    assert report["exit_code"] == 1
    assert report["counts"] == {"PASS": 1, "REGRESSED": 1}
    suites = junitparser.JUnitXml.fromfile(str(files["junit"]))
    assert sum(suite.failures for suite in suites) == 1
    assert Path(report["records"]).is_file()


def test_a_report_that_can_not_be_written_is_known_before_anything_is_measured(monkeypatch):
    fake = Fake({"numba/one": 1.0})
    done = gate(monkeypatch, fake, "--junit", "no/such/folder/report.xml")
    assert isinstance(done.exception, ContainerError)
    assert not fake.calls


def test_going_on_needs_no_other_option(monkeypatch):
    fake = Fake({"numba/one": 1.1})
    install(monkeypatch, fake, (target("numba/one"),))
    first = run("--baseline", "base", "--pairs", "5")
    (file,) = Path("results").rglob("*.jsonl")
    again = Fake({"numba/one": 1.1})
    install(monkeypatch, again, (target("numba/one"),))
    second = run("--resume", str(file))
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert not again.calls
    file.write_text("", encoding="utf-8")
    assert isinstance(run("--resume", str(file)).exception, ContainerError)


def test_slow_and_configs_need_no_baseline(monkeypatch):
    install(monkeypatch, Fake({"numba/one": 1.0}), (target("numba/one"),))
    done = run("--slow", "10")
    assert done.exit_code == 1, done.output
    assert "slower by 1" in done.stdout
    refused = run()
    assert refused.exit_code == 2
    assert "--baseline" in refused.output


def test_thresholds_are_read(monkeypatch, tmp_path):
    path = tmp_path / "gate.toml"
    path.write_text("[rule]\nratio = 1.2\n", encoding="utf-8")
    fake = Fake({"numba/one": 1.1})
    assert gate(monkeypatch, fake, "--thresholds", str(path)).exit_code == 0
    path.write_text("[rule]\nratio = 0\n", encoding="utf-8")
    done = gate(monkeypatch, fake, "--thresholds", str(path))
    assert isinstance(done.exception, ConfigError)


def test_a_dry_run_measures_nothing(monkeypatch):
    fake = Fake({"numba/table": 1.0, "numba/fused_rq": 1.0})
    install(monkeypatch, fake, (target("numba/table"), target("numba/fused_rq", format="vq-256x8")))
    done = run("--baseline", "base", "--dry-run")
    assert done.exit_code == 0
    assert not fake.calls
    assert "unknown" in done.stdout and "selfcheck" in done.stdout
    assert "refused: one stage leaves nothing to fuse" in done.stdout
    assert "1 cases, 7 pairs of processes: about 63 s" in done.stdout


# ------------------------------------------------------------------------------------------------
# selfcheck


def selfcheck(*words: str):
    return CliRunner().invoke(cli, ["selfcheck", "--device", "cpu", "--threads", "2", *words])


def test_a_selfcheck_counts_and_stores_what_the_gate_reads(monkeypatch):
    # one code on both sides: a gate would call it IDENTICAL
    code = {(side, "numba/table"): "code" for side in ("base", "cand")}
    fake = Fake({"numba/table": 1.0}, code=code, noise=0.01)
    install(monkeypatch, fake, (target(),))
    words = ("--rounds", "3", "--slow-rounds", "2", "--slow", "8", "-o", "json")
    done = selfcheck(*words)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["slower"], row["floors"], row["comparisons"]) for row in rows] == [
        (0.0, "no", 3),
        (0.08, "no", 2),
        (0.0, "yes", 3),
        (0.08, "yes", 2),
    ]
    assert [row["regressed"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    noise = load(None, detect_cpu(2))
    assert noise is not None
    assert 1 < noise.floor(target().name) < 1.03
    assert 0.005 < noise.spread(target().name) < 0.03
    planned = run("--baseline", "base", "--dry-run")
    assert "standard deviation" in planned.stdout and "unknown" not in planned.stdout
    (file,) = Path("results").rglob("*-selfcheck.jsonl")
    again = Fake({"numba/table": 1.0}, code=code, noise=0.01)
    install(monkeypatch, again, (target(),))
    resumed = selfcheck(*words, "--resume", str(file))
    assert json.loads(resumed.stdout) == rows
    assert not again.calls


def test_a_simulation_measures_nothing(monkeypatch):
    fake = Fake({"numba/table": 1.0})
    install(monkeypatch, fake, (target(),))
    done = selfcheck("--simulate", "20")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) > 12
    assert not fake.calls
