"""Codebooks that layers share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from bench import cli
from vqkernels import container
from vqkernels.calibration import Calibration, save_calibration
from vqkernels.presets import parse_format
from vqkernels.quantize import Recipe, quantize, relative_error, shared

FORMAT = "rq-2x16x4"
GENERATOR = torch.Generator().manual_seed(3)
WEIGHTS = {
    "a.weight": torch.randn(32, 32, generator=GENERATOR),
    "b.weight": torch.randn(16, 64, generator=GENERATOR) ** 3,
    "c.weight": torch.randn(24, 24, generator=GENERATOR),
    "small.weight": torch.randn(4, 8, generator=GENERATOR),
}
LARGE = ["a.weight", "b.weight", "c.weight"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def run(model: Path, *arguments: str) -> Result:
    command = ["quantize", str(model), "-f", FORMAT, "-o", str(model.parent / "out"), "--name=m"]
    return CliRunner().invoke(cli.cli, [*command, "--shared", "--iterations=5", *arguments])


def test_layers_of_one_format_share(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    inputs = torch.randn(100, 32, generator=GENERATOR) * torch.linspace(0.1, 3, 32)
    calibration = Calibration.from_activations({"a": inputs})
    save_calibration(path, calibration)
    result = run(model, "--layer-format", "c.*=vq-16x4", "--calibration", str(path), "--seed=2")
    assert result.exit_code == 0, result.output
    assert "refused small.weight" in result.stderr  # nor does it take part in the training
    found = container.open_container(tmp_path / "out" / "m.vq.safetensors")
    moments = calibration["a"]
    recipe = Recipe(iterations=5)
    weights = {name: WEIGHTS[name] for name in ("a.weight", "b.weight")}
    books = shared.train(
        weights,
        parse_format(FORMAT),
        recipe=recipe,
        seed=2,
        importance={"a.weight": moments.diagonal},
    )
    for name, weight in weights.items():
        hessian = moments.gram if name == "a.weight" else None
        expected = quantize(
            weight, parse_format(FORMAT), recipe=recipe, hessian=hessian, codebooks=books
        )
        assert torch.equal(found[name].decode(), expected.decode())
        assert found.outline(name).made["codebooks"] == "shared by the layers of one format"
    for stage in range(2):
        one, other = (found[name].parts[f"codebook_{stage}"] for name in weights)
        assert torch.equal(one, other)
    assert found.outline("c.weight").spec == parse_format("vq-16x4")
    assert found.info.provenance["codebooks"] == "shared by the layers of one format"


def test_it_is_another_job(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bench.commands.quantize.write", interrupt)
        assert run(model).exit_code == 130
    command = ["quantize", str(model), "-f", FORMAT, "-o", str(tmp_path / "out"), "--name=m"]
    result = CliRunner().invoke(cli.cli, [*command, "--iterations=5"])
    assert "another job (shared True, not False)" in str(result.exception)


def test_nothing_is_trained_where_all_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bench.commands.quantize.write", interrupt)
        assert run(model).exit_code == 130
    monkeypatch.setattr("bench.quantizing.shared.train", None)
    assert run(model).exit_code == 0


def test_a_sample_that_covers_too_little_is_told(model: Path) -> None:
    result = run(model, "--set", "sample=20")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "the sample" in line]
    assert line.startswith("a.weight: ")
    assert "vectors an entry" in line


@pytest.mark.parametrize(
    "name",
    [
        "vq-16x4",
        f"{FORMAT},coefficients=1+0.5",
        f"{FORMAT},codebook_dtype=int8",
        "pq-m32,stages=16",
    ],
)
def test_shared_codebooks_come_near_a_layer_s_own(name: str) -> None:
    spec = parse_format(name)
    shape = (512, 128) if spec.subspaces > 1 else (64, 128)
    weights = {str(number): torch.randn(*shape, generator=GENERATOR) for number in range(2)}
    recipe = Recipe(iterations=5, refits=2)
    books = shared.train(weights, spec, recipe=recipe)
    doubled = [book * 2 for book in books]
    for weight in weights.values():
        own, common, other = (
            relative_error(weight, quantize(weight, spec, recipe=recipe, codebooks=given))
            for given in (None, books, doubled)
        )
        assert common < 1.2 * own < other
