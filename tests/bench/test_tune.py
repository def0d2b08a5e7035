"""`vqbench tune` from the command line, on a product that takes microseconds."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from autotune import tune as loop
from autotune.measurement import Measurement
from autotune.store import Store
from bench import plots, tuning
from bench.cli import cli
from bench.commands import tune as tune_command
from bench.selection import Selection
from vqkernels.device import Device, detect_cpu
from vqkernels.dispatch import Choice
from vqkernels.errors import ContainerError, VqError
from vqkernels.kernel import registry
from vqkernels.space import Config

ARGUMENTS = (
    *("tune", "-w", "toy", "-f", "toy-16-4", "-k", "torch/dequant", "--device", "cpu"),
    *("--threads", "1"),
    *("--strategy", "exhaustive", "--pairs", "2", "--time", "0.01", "-o", "json"),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of known speed: its measurement reads gigabytes."""
    from autotune.bandwidth import Bandwidth

    known = Bandwidth(1e10, 1e12, 1 << 20)
    monkeypatch.setattr(tune_command, "measure_bandwidth", lambda device: known)
    kernel = registry()["torch/dequant"]
    default = Choice(kernel, Config(), "compiles nothing")
    monkeypatch.setattr(tuning, "default_choice", lambda problem, device: default)
    monkeypatch.setattr("vqkernels.dispatch.default_choice", lambda *_: default)


def run(*more: str):
    return CliRunner().invoke(cli, [*ARGUMENTS, *more], catch_exceptions=False)


def test_a_product_is_tuned_and_the_next_run_finds_it_done(tmp_path: Path, monkeypatch) -> None:
    url, folder = f"sqlite:///{tmp_path / 'tuning.sqlite'}", tmp_path / "a" / "plots"
    result = run("--store", url, "--plot", str(folder))
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["n"], row["k"], row["m"], row["format"]) == (16, 16, 1, "toy-16-4")
    assert (row["winner"], row["attempts"]) == ("torch/dequant", 1)
    assert (row["verdict"], row["speedup"]) == ("default kept", None)
    attempts = Store(url).attempts(1)
    assert {one.measurement.status for one in attempts} == {"ok"}
    assert len(Store(url).verdicts()) == 1
    plotted = {path.name for path in folder.iterdir()}
    assert plotted == {
        "weight-16x16-toy-16-4-m1-convergence.png",
        "weight-16x16-toy-16-4-m1-torch-dequant-parameters.png",
    }
    assert f"plots: {folder}" in result.stderr
    monkeypatch.setattr(tuning, "Processes", Untouched)
    again = run("--store", url, "--plot", str(folder / "again"))
    assert again.exit_code == 0, again.output
    assert Store(url).attempts(1) == attempts
    assert {path.name for path in (folder / "again").iterdir()} == plotted


class Untouched:
    """Processes that must not be asked for anything."""

    spent_s: ClassVar = collections.Counter()

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def coming(self, choices: list[object]) -> None:
        assert choices == [], "nothing is left to measure"

    def __enter__(self) -> Untouched:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_an_unknown_strategy(tmp_path: Path) -> None:
    result = run("--strategy", "guessing", "--store", f"sqlite:///{tmp_path / 'x'}")
    assert result.exit_code == 2
    assert "'guessing' is not one of" in result.output
    assert "random" in result.output


def test_layers_of_one_shape_are_one_job() -> None:
    several = Selection(workload="llama3-70b", formats=("aqlm-2x8",), ms=(1, 8))
    found, refused = tuning.jobs([several], detect_cpu(1), "float32", seed=0, cold=True)
    assert [job.layers for job in found if job.recipe.m == 1] == [
        ("q_proj", "o_proj"),
        ("k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    assert len(found) == 8
    assert refused == []


def test_a_fused_layer_is_a_job_in_its_own_format() -> None:
    fused = Selection(workload="llama3-8b", formats=("aqlm-2x8",), layers=("qkv_proj",), fuse=True)
    ((job,), refused) = tuning.jobs([fused], detect_cpu(1), "float32", seed=0, cold=True)
    assert (job.recipe.n, job.recipe.k, job.recipe.spec.group_size) == (6144, 4096, 1024)
    assert refused == []


def test_layers_that_cannot_hold_a_format_are_told() -> None:
    toy = Selection(workload="toy", formats=("rq-2x256x8", "toy-16-4"))
    found, refused = tuning.jobs([toy], detect_cpu(1), "float32", seed=0, cold=True)
    assert [job.format for job in found] == ["toy-16-4"]
    assert refused == [
        "toy weight rq-2x256x8: 256 entries for 32 vectors a codebook (16 x 16, vectors of 8); "
        "choose fewer entries or larger groups"
    ]


@pytest.mark.parametrize("wrong", ["matplotlib", "folder"])
def test_what_stops_plots_is_told_before_any_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    folder = tmp_path / "plots"
    if wrong == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        told = r"pip install 'vqbench\[plot\]'"
    else:
        folder.write_text("a file")
        told = f"{folder}: .*; choose another folder"
    store = tmp_path / "tuning.sqlite"
    with pytest.raises(VqError, match=told):
        run("--store", f"sqlite:///{store}", "--plot", str(folder))
    assert not store.exists()


def tuned_at_once(job: tuning.Job, kernels: object, device: Device, store: Store, *_: object):
    """A job of one attempt, which failed."""
    kernel = registry()["torch/dequant"]
    only = loop.Choice(kernel.id, kernel.source_hash, Config())
    claim = store.claim(store.subject(job.recipe.facts(device)), only.key())
    assert claim is not None
    store.finish(claim, Measurement(status="runtime", reason="told"))
    return tuning.Tuned(job, loop.Result(only, only, None, {}, {"runtime": 1}, {}), 1.0, {})


def test_a_bar_goes_with_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tune_command.Progress):
        def __init__(self, *columns: object, **fields: object) -> None:
            super().__init__(*columns, **fields)
            bars.append(self)

    monkeypatch.setattr(tune_command, "Progress", Bar)
    monkeypatch.setattr(tuning, "tune_job", tuned_at_once)
    result = run("-m", "1", "-m", "2", "--store", f"sqlite:///{tmp_path / 'tuning.sqlite'}")
    assert len(json.loads(result.stdout)) == 2
    assert [bar.task_ids for bar in bars] == [[]]


def test_a_full_disk_costs_the_plots_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, pieces: object) -> None:
        raise ContainerError(f"{path}: no space")

    monkeypatch.setattr(tuning, "tune_job", tuned_at_once)
    monkeypatch.setattr(plots, "write_atomically", full)
    url = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    result = run("--store", url, "--plot", str(tmp_path / "plots"))
    assert result.exit_code == 0, result.output
    assert f"! {tmp_path / 'plots' / 'weight-16x16'}" in result.stderr
    assert "no space" in result.stderr
    assert json.loads(result.stdout)[0]["winner"] == "torch/dequant"
