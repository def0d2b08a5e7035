"""`vqbench tune` from the command line, on a product that takes microseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.store import Store
from bench import tuning
from bench.cli import cli
from bench.commands import tune as tune_command
from bench.selection import Selection
from vqkernels.device import detect_cpu
from vqkernels.dispatch import Choice
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
    url = f"sqlite:///{tmp_path / 'tuning.sqlite'}"
    result = run("--store", url)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["n"], row["k"], row["m"], row["format"]) == (16, 16, 1, "toy-16-4")
    assert (row["winner"], row["attempts"]) == ("torch/dequant", 1)
    assert (row["verdict"], row["speedup"]) == ("default kept", None)
    attempts = Store(url).attempts(1)
    assert {one.measurement.status for one in attempts} == {"ok"}
    assert len(Store(url).verdicts()) == 1
    monkeypatch.setattr(tuning, "Processes", Untouched)
    again = run("--store", url)
    assert again.exit_code == 0, again.output
    assert Store(url).attempts(1) == attempts


class Untouched:
    """Processes that must not be asked for anything."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

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
