"""`vqbench predict`: rows for people and machines, marked as predicted; measurements beside."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.cli import cli
from bench.tables import OUTPUTS
from vqkernels.device import known_device
from vqkernels.errors import BackendError, SpecError
from vqkernels.kernel import registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

H100 = known_device("h100")
LAYER = ("-w", "llama2-7b", "-l", "q_proj", "-f", "rq-2x256x8")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["predict", *arguments])


def rows(*arguments: str) -> list[dict[str, Any]]:
    result = run("--device", "h100", *LAYER, "-o", "json", *arguments)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def record(path: Path, **changes: Any) -> Path:
    """A results file of one record of cuda/staged in its default config, 30 us."""
    kernel = registry()["cuda/staged"]
    problem = Problem(m=1, n=4096, k=4096, spec=PRESETS["rq-2x256x8"], dtype="float16")
    timing = {"timer": "cuda_event", "warmup_s": 0.1, "copies": 9, "cache": {"codes": "cold"}}
    fields = {
        "schema": 1,
        "device": H100.to_dict(),
        "workload": "another",
        "layer": "another",
        "format": "rq-2x256x8",
        "spec": {},
        "n": 4096,
        "k": 4096,
        "m": 1,
        "dtype": "float16",
        "kernel": kernel.id,
        "kernel_source": "",
        "config": dict(kernel.default(problem, H100)),
        "config_from": "default",
        "seed": 0,
        "codes": "",
        "relative_error": 0.1,
        "effective_bits": 2.0,
        "status": "ok",
        "reason": "",
        "samples_s": [2e-5, 3e-5, 4e-5],
        "timing": timing,
        "correctness": {"worst": 0.1, "max_abs": 0.0, "relative_rms": 0.0, "controls": {}},
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    return path


def test_one_row_a_product_and_kernel_that_counts() -> None:
    found = rows("-m", "1", "-m", "8", "-k", "cuda/*")
    assert {(row["kernel"], row["m"]) for row in found} == {
        (f"cuda/{name}", m)
        for name in ("dequant", "fused_rq", "mma", "naive", "staged", "table", "vectorized")
        for m in (1, 8)
    }
    for row in found:
        assert row["device"] == H100.name
        assert row["binds"] in {"fixed", "hbm", "l2", "shared", "issue", "tensor", "latency"}
        assert row["predicted_us"] >= row["fixed_us"] + row["hbm_us"]
        assert row["measured_us"] is None
        # 2 bits a weight and the codebooks, at 3.35 TB/s: 1.26 us
        assert row["floor_percent"] / 100 * row["predicted_us"] == pytest.approx(1.27, abs=0.03)
        assert row["dense_floor_us"] == pytest.approx(10.0, abs=0.1)


def test_layers_of_one_shape_are_one_row() -> None:
    result = run("--device", "a100", "-k", "cuda/naive", "-o", "json")
    names = [row["layer"] for row in json.loads(result.stdout)]
    assert names == ["q_proj/k_proj/v_proj/o_proj", "gate_proj/up_proj", "down_proj"]


def test_the_best_by_prediction_are_no_slower_than_the_default() -> None:
    (default,) = rows("-k", "cuda/staged")
    best = rows("-k", "cuda/staged", "--best", "3")
    assert len({row["config"] for row in best}) == 3
    times = [row["predicted_us"] for row in best]
    assert times == sorted(times)
    assert times[-1] < default["predicted_us"]


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_form_says_that_it_is_predicted(output: str) -> None:
    result = run("--device", "h100", *LAYER, "-k", "cuda/naive", "-k", "torch/dense", "-o", output)
    assert result.exit_code == 0
    if output in ("table", "md"):
        assert result.stdout.startswith("Predicted, not measured: NVIDIA H100 80GB HBM3 (sm_90), ")
        assert "predicted us" in result.stdout
    elif output == "csv":
        (row,) = csv.DictReader(io.StringIO(result.stdout))
        assert float(row["predicted_us"]) > 0
    else:
        found = json.loads(result.stdout)
        assert (found if output == "jsonl" else found[0])["predicted_us"] > 0
    assert "1 x torch/dense: torch/dense doesn't say what its configs do" in result.stderr


def test_a_measurement_stands_beside_the_prediction_of_its_config(tmp_path: Path) -> None:
    named = record(tmp_path / "a.jsonl")
    (row,) = rows("-k", "cuda/staged", "--records", str(named))
    assert row["measured_us"] == pytest.approx(30)
    assert row["ratio"] == pytest.approx(30 / row["predicted_us"])
    assert row["timer"] == "cuda_event"
    shown = run("--device", "h100", *LAYER, "-k", "cuda/staged", "--records", str(named)).stdout
    assert "measured/predicted" in shown


def test_a_measured_config_has_a_row_of_its_own(tmp_path: Path) -> None:
    (default,) = rows("-k", "cuda/staged")
    config = dict(item.split("=") for item in default["config"].split())
    other = {name: int(v) if v.isdigit() else v for name, v in config.items()} | {"splits": 4}
    named = record(tmp_path / "a.jsonl", config=other)
    first, second = rows("-k", "cuda/staged", "--records", str(named))
    assert first["measured_us"] is None
    assert "splits=4" in second["config"]
    assert second["measured_us"] == pytest.approx(30)


def test_records_of_the_device_are_found_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h100-80gb-hbm3-sm-90"
    record(folder / "a.jsonl")
    record(folder / "b.jsonl", samples_s=[5e-5])
    (row,) = rows("-k", "cuda/staged", "--results", str(tmp_path))
    assert row["measured_us"] == pytest.approx(40)


@pytest.mark.parametrize(
    "changes",
    [
        {"m": 2},
        {"n": 11008},
        {"dtype": "bfloat16"},
        {"kernel": "cuda/vectorized"},
        {"device": {**H100.to_dict(), "name": "NVIDIA H200"}},
        {"config": {"tile": 3}},
        {"status": "incorrect", "reason": "wrong", "samples_s": [], "timing": None},
        {
            "timing": {
                "timer": "cuda_event",
                "warmup_s": 0.1,
                "copies": 1,
                "cache": {"codes": "hot"},
            }
        },
    ],
    ids=str,
)
def test_what_was_measured_otherwise_stands_nowhere(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (row,) = rows("-k", "cuda/staged", "--records", str(record(tmp_path / "a.jsonl", **changes)))
    assert row["measured_us"] is None


def test_refusals_are_counted() -> None:
    # 65,536 entries are 1 MB
    result = run("--device", "h100", "-k", "cuda/staged", "-f", "vptq-65536-256", "-o", "json")
    assert json.loads(result.stdout) == []
    assert "3 x cuda/staged: codebooks of 1,0" in result.stderr


def test_what_is_unknown_is_named() -> None:
    assert isinstance(run("--device", "v100").exception, BackendError)
    assert isinstance(run("--device", "h100", "-k", "no/such").exception, SpecError)
    assert isinstance(run("--device", "h100", "-l", "no_such").exception, SpecError)
    assert "Missing option '--device'" in run().output
