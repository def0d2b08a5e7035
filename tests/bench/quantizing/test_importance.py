"""Errors that count by what a calibration knows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from bench import cli
from vqkernels import container
from vqkernels.calibration import Calibration, save_calibration
from vqkernels.presets import parse_format
from vqkernels.quantize import quantize, relative_error

FORMAT = "vq-16x4"
GENERATOR = torch.Generator().manual_seed(5)
WEIGHTS = {name: torch.randn(16, 32, generator=GENERATOR) for name in ("a.weight", "b.weight")}
# inputs that differ much in size, so that their moments matter
INPUTS = torch.randn(200, 32, generator=GENERATOR) * torch.linspace(0.1, 3, 32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def calibrated(path: Path, inputs: dict[str, torch.Tensor], *, full: bool = True) -> Calibration:
    found = Calibration.from_activations(inputs, full=full)
    save_calibration(path, found)
    return found


def run(model: Path, *arguments: str) -> Result:
    folder = str(model.parent / "out")
    return CliRunner().invoke(
        cli.cli, ["quantize", str(model), "-f", FORMAT, "-o", folder, "--name=m", *arguments]
    )


@pytest.mark.parametrize("full", [True, False])
def test_moments_are_the_hessian(full: bool, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    moments = calibrated(path, {"a": INPUTS}, full=full)["a"]
    result = run(model, "--calibration", str(path))
    assert result.exit_code == 0, result.output
    assert f"not in {path}, so every error counts alike there: b.weight\n" in result.stderr
    hessians = {"a.weight": moments.gram if full else moments.diagonal, "b.weight": None}
    source = container.open_container(tmp_path / "out" / "m.vq.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, hessian in hessians.items():
        expected = quantize(WEIGHTS[name], parse_format(FORMAT), hessian=hessian)
        assert torch.equal(source[name].decode(), expected.decode())
        assert source.outline(name).made["error"] == relative_error(WEIGHTS[name], expected)
    told = f"{path.name} (SHA-256 {digest})"
    assert source.outline("a.weight").made["calibration"] == told
    assert "calibration" not in source.outline("b.weight").made
    assert source.info.provenance["calibration"] == path.name
    assert source.info.provenance["calibration_sha256"] == digest


def test_another_calibration_is_another_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "moments.safetensors"
    calibrated(path, {"a": INPUTS, "b": INPUTS})
    with monkeypatch.context() as patch:
        patch.setattr("bench.commands.quantize.write", _interrupt)
        assert run(model, "--calibration", str(path)).exit_code == 130
    assert "another job (other calibration)" in str(run(model).exception)
    calibrated(path, {"a": INPUTS, "b": 2 * INPUTS})
    message = str(run(model, "--calibration", str(path)).exception)
    assert "another job (calibration " in message


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_bad_calibrations(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    arguments = ("--calibration", str(path))
    said = [str(run(model, *arguments).exception)]
    calibrated(path, {"c.d": INPUTS})
    said.append(str(run(model, *arguments).exception))
    calibrated(path, {"a": INPUTS[:, :31], "b": INPUTS})
    said.append(str(run(model, *arguments).exception))
    path.write_bytes(path.read_bytes()[:-1])
    said.append(str(run(model, *arguments).exception))
    words = ["is not a file", "of other layers (c.d, ...)", "has 32 inputs, but 31", "truncated"]
    for message, word in zip(said, words, strict=True):
        assert message.startswith(f"{path}: ")
        assert word in message
        assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_clip_limits_are_told(model: Path, tmp_path: Path) -> None:
    assert run(model, "--set", "clip=2").exit_code == 0
    made = container.open_container(tmp_path / "out" / "m.vq.safetensors").outline("a.weight").made
    assert made["clip_percentiles"] == (2, 98)
    low, high = made["clip"]
    weight = WEIGHTS["a.weight"]
    assert abs(float((weight < low).float().mean()) - 0.02) < 0.003
    assert abs(float((weight > high).float().mean()) - 0.02) < 0.003
