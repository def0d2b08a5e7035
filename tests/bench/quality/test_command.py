"""`vqbench quality`: tables, the report in JSON, limits, and every way it can go wrong."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from bench import cli
from bench.quality.report import SCHEMA_VERSION, read_report
from tests.bench.checkpoints import Q, make_vptq
from tests.bench.quality.models import (
    OUTPUT,
    QUERY,
    dense,
    inputs,
    make_model,
    make_quantised,
    quantised,
)
from vqkernels.calibration import Calibration, save_calibration
from vqkernels.formats.npz import save_npz
from vqkernels.presets import parse_format
from vqkernels.quality import distortion, run_error
from vqkernels.quantize import quantize, relative_error
from vqkernels.spec import CodebookSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.safetensors")


@pytest.fixture
def container(tmp_path: Path) -> Path:
    return make_quantised(tmp_path / "x.vq.safetensors")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, ["quality", *map(str, arguments)])


def report(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    target = tmp_path / "report.json"
    result = run(*arguments, "--json", target)
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(target.read_text())
    return content


def test_judges_every_layer_and_all_together(model: Path, container: Path, tmp_path: Path) -> None:
    found = report(tmp_path, model, container)
    assert found["vqbench_quality"] == SCHEMA_VERSION
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert found["model"] == {"name": "model.safetensors", "sha256": {"model.safetensors": digest}}
    assert (found["seed"], found["calibration"]) == (0, None)
    assert "torch" in found["environment"]["versions"]
    (one,) = found["candidates"]
    assert one["label"] == "x.vq.safetensors"
    assert one["origin"]["sha256"] == {
        "x.vq.safetensors": hashlib.sha256(container.read_bytes()).hexdigest()
    }
    assert one["origin"]["provenance"]["note"] == "mine"
    assert (one["unmatched"], one["dense"]) == ([], ["embed.weight"])
    assert [layer["layer"] for layer in one["layers"]] == [QUERY, OUTPUT]
    assert one["layers"][0]["made"] == {"seed": 1, "holdout_error": 0.25}
    for layer in one["layers"]:
        expected = distortion(dense()[layer["layer"]], quantised()[layer["layer"]])
        assert layer["measures"]["relative_error"] == expected.relative_error
        assert layer["measures"]["cosine"] == expected.cosine
        assert layer["inputs"] == "gaussian"
    measures = [layer["measures"] for layer in one["layers"]]
    weights = torch.tensor([24 * 32, 16 * 24], dtype=torch.float64)
    for name in ("mse", "relative_error", "output_cosine", "bits"):
        values = torch.tensor([each[name] for each in measures], dtype=torch.float64)
        assert one["totals"][name] == pytest.approx(float((values * weights).sum() / weights.sum()))


def test_a_table_of_layers_totals_and_the_worst(model: Path, container: Path) -> None:
    result = run(model, container, "--worst", 1)
    assert result.exit_code == 0
    layers, totals, worst = result.stdout.split("\n\n", 1)[0], *result.stdout.split("by")[1:]
    assert "weighted" not in layers.splitlines()[0]
    query = next(line for line in layers.splitlines() if QUERY in line).split()
    assert query[1] == "24x32"
    assert f"{relative_error(dense()[QUERY], quantised()[QUERY]):.4g}" in query
    assert query[-1] == "gaussian"
    assert "1,152" in totals
    assert (QUERY in worst) != (OUTPUT in worst)
    assert "2 layers: on made-up Gaussian inputs" in result.stderr
    assert "x.vq.safetensors: 1 matrices are left dense: embed.weight" in result.stderr
    short = run(model, container, "--totals", "-o", "md").stdout
    assert short.startswith("## All layers, by their weights\n\n| candidate |")
    assert QUERY not in short


@pytest.mark.parametrize("error", [9.0, "nan", "inf"])
def test_the_worst_layer_is_the_one_with_the_largest_error(
    error: object, model: Path, container: Path, tmp_path: Path
) -> None:
    target = tmp_path / "report.json"
    for bad, good in ((0, 1), (1, 0)):
        content = report(tmp_path, model, container)
        layers = content["candidates"][0]["layers"]
        layers[bad]["measures"]["output_error"] = error
        layers[good]["measures"]["output_error"] = 1.0
        target.write_text(json.dumps(content))
        worst = run(target, "--worst", 1).stdout.split("Worst 1 by output error")[1]
        assert layers[bad]["layer"] in worst
        assert layers[good]["layer"] not in worst


def test_an_exact_container_has_lost_nothing_and_one_swapped_code_shows(
    container: Path, tmp_path: Path
) -> None:
    tensors = quantised()
    exact = {name: tensor.decode() for name, tensor in tensors.items()}
    model = make_model(tmp_path / "exact.safetensors", exact)
    (one,) = report(tmp_path, model, container, "--limit", "max_error=0")["candidates"]
    for name, value in (("relative_error", 0), ("mse", 0), ("output_error", 0)):
        assert one["totals"][name] == value
    assert one["totals"]["output_cosine_worst"] == pytest.approx(1, abs=1e-12)
    codes = tensors[QUERY].parts["codes"].clone()
    codes[3, 2, 0] ^= 1
    swapped = tensors | {QUERY: tensors[QUERY].replace_parts(codes=codes)}
    result = run(model, make_quantised(tmp_path / "y.safetensors", swapped), "--limit", "mse=0")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("beyond")]
    assert line.startswith(f"beyond its limit: y.safetensors: {QUERY}: mse ")


def test_modules_are_their_weights_and_strangers_are_said(model: Path, tmp_path: Path) -> None:
    tensors = {"0.query": quantised()[QUERY], "1.query": quantised()[QUERY]}
    path = tmp_path / "x.npz"
    save_npz(path, tensors)
    result = run(model, path)
    assert result.exit_code == 0
    assert "x.npz: not in the dense model: 1.query" in result.stderr
    (one,) = report(tmp_path, model, path)["candidates"]
    assert [(layer["layer"], layer["tensor"]) for layer in one["layers"]] == [("0.query", QUERY)]
    assert one["unmatched"] == ["1.query"]
    assert one["origin"]["sha256"] == {"x.npz": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_checkpoint_against_a_sharded_folder(tmp_path: Path) -> None:
    tensors = make_vptq(tmp_path / "vptq")
    folder = tmp_path / "dense"
    folder.mkdir()
    names = {f"{name}.weight": f"model-{at}.safetensors" for at, name in enumerate(tensors)}
    for name, file in names.items():
        weight = tensors[name.removesuffix(".weight")].decode().to(torch.bfloat16)
        save_file({name: weight}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = report(tmp_path, folder, tmp_path / "vptq", "-l", "*q_proj")
    assert set(found["model"]["sha256"]) == set(names.values())
    (one,) = found["candidates"]
    (layer,) = one["layers"]
    assert layer["layer"] == Q
    assert 0 < layer["measures"]["relative_error"] < 1e-4  # bfloat16 of the dense model
    assert {"config.json", "model.safetensors"} <= set(one["origin"]["sha256"])


def test_formats_are_quantised_here_and_compared(model: Path, tmp_path: Path) -> None:
    arguments = [model, "-f", "vq-16x4", "-f", "rq-2x16x4", "-f", "vq-256x8", "--seed", 5]
    found = report(tmp_path, *arguments)
    small, large, never = found["candidates"]
    assert [one["label"] for one in found["candidates"]] == ["vq-16x4", "rq-2x16x4", "vq-256x8"]
    assert (small["origin"]["seed"], small["origin"]["format"]["stages"]) == (5, [16])
    assert [layer["layer"] for layer in small["layers"]] == [OUTPUT, QUERY]
    for layer in large["layers"]:
        weight = dense()[layer["layer"]]
        expected = quantize(weight, CodebookSpec.from_dict(large["origin"]["format"]), seed=5)
        assert layer["measures"]["relative_error"] == pytest.approx(
            relative_error(weight, expected), rel=1e-12
        )
    assert large["totals"]["mse"] < small["totals"]["mse"]
    assert not never["layers"]
    assert "256 entries for 96 vectors" in never["refused"][QUERY]
    again = report(tmp_path, *arguments)
    assert again["candidates"] == found["candidates"]
    result = run(*arguments)
    assert f"vq-256x8: refused {QUERY}: 256 entries" in result.stderr
    head = result.stdout.splitlines()[0].split()
    assert head[:2] == ["candidate", "layer"]


def test_a_calibration_says_what_errors_weigh(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    # inputs that matter very unlike
    x = inputs(32, tokens=200) * torch.logspace(-2, 0, 32)
    recorded = {"0.query": x, "9.value": x}
    calibration = Calibration.from_activations(recorded, holdout=0.2)
    save_calibration(path, calibration)
    arguments = [model, "-f", "vq-16x4", "--calibration", path, "--seed", 2]
    plain = report(tmp_path, *arguments)
    assert plain["calibration"]["layers"] == 2
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert plain["calibration"]["sha256"] == {"run.safetensors": digest}
    output, query = plain["candidates"][0]["layers"]
    assert (output["layer"], output["inputs"]) == (OUTPUT, "gaussian")
    assert (query["inputs"], query["tokens"]) == ("held-out", 40)
    moments = calibration["0.query"]
    tensor = quantize(dense()[QUERY], parse_format("vq-16x4"), seed=2)
    assert moments.gram is not None
    expected = run_error(dense()[QUERY], tensor, moments.gram)
    assert query["measures"]["run_error"] == pytest.approx(expected.error, rel=1e-9)
    result = run(*arguments, "--limit", "run_error<=1")
    assert result.exit_code == 1
    assert f"vq-16x4: {OUTPUT}: run_error was not measured" in result.stderr
    assert "outputs of 1 layers: on held-out tokens" in result.stderr
    (weighted,) = report(tmp_path, *arguments, "--weighted", "--set", "beam=3")["candidates"]
    assert (weighted["origin"]["weighted"], weighted["origin"]["recipe"]) == (True, {"beam": 3})
    better = weighted["layers"][1]["measures"]
    assert better["weighted_error"] < 0.7 * query["measures"]["weighted_error"]
    assert better["relative_error"] > query["measures"]["relative_error"]


def test_entries_of_int8_have_a_cost(model: Path, tmp_path: Path) -> None:
    toml = tmp_path / "small.toml"
    toml.write_text('vector_length = 4\nstages = [16]\ncodebook_dtype = "int8"\n')
    target = tmp_path / "report.json"
    result = run(model, "-f", toml, "-f", "vq-16x4", "--json", target, "--totals")
    assert "int8 cost" in result.stdout
    int8, half = read_report(target).candidates
    assert (int8.label, half.label) == ("small", "vq-16x4")
    assert 0 < (int8.totals["int8_cost"] or 0) < 0.05
    assert half.totals["int8_cost"] is None


def test_several_of_one_name_are_told_apart(model: Path, tmp_path: Path) -> None:
    paths = [make_quantised(_folder(tmp_path / at) / "x.npz.safetensors") for at in "ab"]
    found = report(tmp_path, model, *paths)["candidates"]
    assert [one["label"] for one in found] == list(map(str, paths))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_machine_forms_have_every_measure(model: Path, container: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run(model, container, "-o", "csv").stdout)))
    assert [row["layer"] for row in rows] == [QUERY, OUTPUT, "total"]
    assert (
        float(rows[0]["relative_error"])
        == distortion(dense()[QUERY], quantised()[QUERY]).relative_error
    )
    assert rows[0]["run_error"] == ""
    lines = [json.loads(line) for line in run(model, container, "-o", "jsonl").stdout.splitlines()]
    assert lines[0]["output_cosine_worst"] == float(rows[0]["output_cosine_worst"])


def test_a_report_is_read_again_and_held_to_limits(
    model: Path, container: Path, tmp_path: Path
) -> None:
    target = tmp_path / "report.json"
    first = run(model, container, "--json", target)
    second = run(target)
    assert second.exit_code == 0
    assert (second.stdout, second.stderr) == (first.stdout, first.stderr)
    assert read_report(target).to_dict() == json.loads(target.read_text())
    result = run(target, "--limit", "relative_error=0.01", "--limit", "total.cosine=0.5")
    assert result.exit_code == 1
    assert result.stderr.count("beyond its limit: ") == 2
    assert run(target, "--limit", "total.mse<=1", "--limit", "bits>=1").exit_code == 0
    with pytest.raises(SystemExit) as end:
        main("quality", str(target), str(container))
    assert end.value.code == 2


def test_infinite_errors_survive_the_file(tmp_path: Path, container: Path) -> None:
    tensors = dense() | {QUERY: torch.zeros(24, 32)}
    target = tmp_path / "report.json"
    result = run(make_model(tmp_path / "m.safetensors", tensors), container, "--json", target)
    assert result.exit_code == 0
    assert " inf " in result.stdout
    content = target.read_text()
    assert '"relative_error": "inf"' in content
    assert "Infinity" not in content
    found = read_report(target)
    assert found.candidates[0].layers[0].measures["relative_error"] == math.inf
    assert run(target, "--limit", "relative_error=1e9").exit_code == 1
    target.write_text(content.replace('"relative_error": "inf"', '"relative_error": "nan"'))
    for limit in ("relative_error<=9", "relative_error>=0"):
        result = run(target, "--limit", limit)
        assert "relative_error nan is not" in result.stderr
        assert result.exit_code == 1


def test_a_report_is_kept_when_a_limit_is_of_nothing(
    model: Path, container: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.json"
    arguments = ("quality", str(model), str(container), "--json", str(target))
    with pytest.raises(SystemExit) as end:
        main(*arguments, "--limit", "run_error=0.1")
    assert end.value.code == 2
    assert "error: limit run_error: the report has no such number" in capsys.readouterr().err
    assert read_report(target).candidates


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "give what is quantised: QUANTISED, or --format"),
        (["none.safetensors", "x"], "error: none.safetensors: there is no such file"),
        (["model", "none"], "error: none: there is no such file"),
        (["x", "x"], "holds no floating-point matrix; give a dense model"),
        (["other", "x"], "none of its 2 matrices (0.query.weight, 0.output.weight) is in"),
        (["wide", "x"], "tensor '0.query.weight': weight: shape [24, 33], but the tensor is"),
        (["nan", "x"], "tensor '0.query.weight': weight: holds NaN"),
        (["model", "x", "-l", "*.key.*"], "no tensor matches '*.key.*'"),
        (["model", "-f", "vq-16x4", "-l", "*.key.*"], "no tensor matches *.key.*"),
        (["model", "-f", "vq-9"], "error: format 'vq-9' is unknown"),
        (["nan", "-f", "vq-16x4"], "tensor '0.query.weight': weight: holds NaN or infinity"),
        (["model", "x", "--limit", "mse"], "error: limit 'mse' is none; write NAME=VALUE"),
        (["model", "x", "--limit", "mse=1.2.3"], "error: limit 'mse=1.2.3' is none"),
        (["model", "x", "--limit", "speed=1"], "nothing is called 'speed'; there are bits"),
        (["model", "x", "--limit", "total.speed<=1"], "nothing is called 'speed'"),
        (["model", "x", "--limit", "a.b=1"], "say which way, with a.b<=VALUE or a.b>=VALUE"),
        (["model", "x", "--json", "none/x.json"], "error: none/x.json: can't be written"),
        (["model", "x", "--calibration", "model"], "error: model: is no calibration"),
        (["model", "x", "--calibration", "run"], "none of its 1 layers (z, ...) is in model"),
        (["model", "x", "--weighted"], "--weighted is of --format, by a --calibration"),
        (["model", "-f", "vq-16x4", "--set", "beam"], "--set beam: write NAME=VALUE"),
        (["bad.json"], "is no valid JSON"),
        (["empty.json"], "is no quality report, and this vqbench reads version 1"),
        (["new.json"], "is a quality report of version 2, and this vqbench reads version 1"),
        (["part.json"], "is no whole quality report (KeyError: "),
    ],
)
def test_bad_input_ends_in_2_with_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = dense()
    make_quantised(tmp_path / "x")
    make_model(tmp_path / "model")
    make_model(tmp_path / "other", {"a.weight": torch.ones(2, 2)})
    make_model(tmp_path / "wide", tensors | {QUERY: torch.ones(24, 33)})
    make_model(tmp_path / "nan", tensors | {QUERY: torch.full((24, 32), math.nan)})
    save_calibration(tmp_path / "run", Calibration.from_activations({"z": torch.ones(9, 2)}))
    texts = {"bad": "{", "empty": "{}", "new": '{"vqbench_quality": 2}'}
    for name, text in (texts | {"part": '{"vqbench_quality": 1}'}).items():
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        main("quality", *arguments)
    assert end.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert not output.out


def main(*arguments: str) -> None:
    argv, sys.argv = sys.argv, ["vqbench", *arguments]
    try:
        cli.main()
    finally:
        sys.argv = argv
