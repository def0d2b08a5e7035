"""Runs that were cut short: what is gone on with, and what is refused."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from bench import cli
from bench.quantizing import layers, work
from vqkernels import container
from vqkernels.atomic import locked
from vqkernels.errors import ContainerError
from vqkernels.quantize import quantize

FORMAT = "rq-2x16x4"
NAMES = ["0.weight", "1.weight", "10.weight", "2.weight"]
TARGET = f"model.{FORMAT}.vq.safetensors"
WORK = f".{TARGET}.work"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(path)
    return path


@pytest.fixture(autouse=True)
def same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of two runs can only be equal if both say the same of when."""

    class Clock(work.datetime):  # type: ignore[misc,name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return work.datetime.fromisoformat("2026-01-02T00:00:00+00:00")

    monkeypatch.setattr(work, "datetime", Clock)


def save(path: Path, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    save_file({name: torch.randn(16, 32, generator=generator) for name in NAMES}, path)


def run(model: Path, folder: Path, *arguments: str) -> Result:
    command = ["quantize", str(model), "-f", FORMAT, "-o", str(folder), "--iterations", "2"]
    return CliRunner().invoke(cli.cli, [*command, *arguments])


Stop = Callable[..., list[str]]


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Lets quantising fail at the layer numbered `at`, from 0; returns the list of what began."""

    def armed(at: int = -1, error: BaseException | None = None) -> list[str]:
        seen: list[str] = []

        def stopped(weight: Any, *arguments: Any, **options: Any) -> Any:
            if len(seen) == at:
                raise error or KeyboardInterrupt
            seen.append("layer")
            return quantize(weight, *arguments, **options)

        monkeypatch.setattr(layers, "quantize", stopped)
        return seen

    return armed


@pytest.fixture
def begun(model: Path, tmp_path: Path, stop: Stop) -> Path:
    """The output folder of a run that was interrupted after two layers."""
    stop(at=2)
    result = run(model, tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        f"interrupted: {tmp_path / 'out' / TARGET} was not written; 2 of 4 layers are kept: "
        f"the same command goes on"
    ]
    stop()
    return tmp_path / "out"


def whole(model: Path, folder: Path, *arguments: str) -> bytes:
    assert run(model, folder, *arguments).exit_code == 0
    (path,) = folder.iterdir()
    return path.read_bytes()


def test_interrupted_and_gone_on_with(model: Path, begun: Path, tmp_path: Path, stop: Stop) -> None:
    assert [path.name for path in begun.iterdir()] == [WORK]
    seen = stop()
    result = run(model, begun)
    assert result.exit_code == 0, result.output
    assert len(seen) == 2
    assert "going on: 2 of 4 layers are done already" in result.stderr
    assert [path.name for path in begun.iterdir()] == [TARGET]
    assert (begun / TARGET).read_bytes() == whole(model, tmp_path / "whole")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0] in NAMES] == NAMES


def test_equals_what_save_writes(model: Path, tmp_path: Path) -> None:
    for codes in ("packed", "ans"):
        found = whole(model, tmp_path / codes, "--codes", codes)
        source = container.open_container(next((tmp_path / codes).iterdir()))
        container.save(
            tmp_path / "saved",
            source,
            provenance=source.info.provenance,
            made={name: source.outline(name).made for name in source},
            codes=codes,
        )
        assert (tmp_path / "saved").read_bytes() == found


def test_order_is_the_model_s_whatever_was_done_before(
    model: Path, tmp_path: Path, stop: Stop
) -> None:
    stop(at=3)
    run(model, tmp_path / "out")
    stop()
    (tmp_path / "out" / WORK / "00001.safetensors").unlink()
    assert run(model, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / TARGET).read_bytes() == whole(model, tmp_path / "whole")


def test_created_is_when_the_job_was_begun(
    model: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = type("Later", (), {"now": lambda _: pytest.fail("nobody asks")})
    monkeypatch.setattr(work, "datetime", later)
    assert run(model, begun).exit_code == 0
    assert container.describe(begun / TARGET).provenance["created"] == "2026-01-02T00:00:00+00:00"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--set", "clip=1"], "other recipe"),
        (["--bias"], "bias False, not True"),
        (["--codes", "ans"], "codes packed, not ans"),
        (["-l", "0.*"], "other formats"),
        (["--layer-format", "1*=vq-16x4"], "other formats"),
    ],
)
def test_another_job_is_refused(
    arguments: list[str], says: str, model: Path, begun: Path, stop: Stop
) -> None:
    before = {path: path.read_bytes() for path in (begun / WORK).iterdir()}
    seen = stop()
    message = str(run(model, begun, *arguments).exception)
    assert message.startswith(f"{begun / WORK}: holds layers of another job ({says}); ")
    assert "--restart" in message
    assert "\n" not in message
    assert {path: path.read_bytes() for path in (begun / WORK).iterdir()} == before
    assert not seen


def test_another_model_is_refused_and_another_version(
    model: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqkernels.__version__", "99.0")
    assert "vqbench " in str(run(model, begun).exception)
    monkeypatch.undo()
    save(model, seed=1)
    assert "another job (source_sha256 " in str(run(model, begun).exception)


def test_restart_starts_anew(model: Path, begun: Path, tmp_path: Path, stop: Stop) -> None:
    (begun / WORK / "mine.txt").write_text("of somebody else")
    seen = stop()
    assert run(model, begun, "--seed", "1", "--restart").exit_code == 0
    assert len(seen) == 4
    assert (begun / TARGET).read_bytes() == whole(model, tmp_path / "whole", "--seed", "1")
    assert [path.name for path in (begun / WORK).iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("spoil", [lambda b: b[:-1] + b"\x01", lambda b: b[:100], lambda b: b""])
def test_a_damaged_layer_is_quantised_again(
    spoil: Callable[[bytes], bytes], model: Path, begun: Path, tmp_path: Path, stop: Stop
) -> None:
    path = begun / WORK / "00000.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    seen = stop()
    result = run(model, begun)
    assert len(seen) == 3
    assert "so 0.weight is quantised again" in result.stderr
    assert (begun / TARGET).read_bytes() == whole(model, tmp_path / "whole")


def test_a_layer_of_another_job_is_quantised_again(
    model: Path, begun: Path, tmp_path: Path, stop: Stop
) -> None:
    stop(at=2)
    run(model, tmp_path / "other", "--seed", "1")
    mine, other = (folder / WORK for folder in (begun, tmp_path / "other"))
    (mine / "00000.safetensors").write_bytes((other / "00000.safetensors").read_bytes())
    (mine / "00002.safetensors").write_bytes((mine / "00001.safetensors").read_bytes())
    seen = stop()
    said = run(model, begun).stderr
    for number in (0, 2):
        assert f"0000{number}.safetensors: is a layer of another job: so " in said
    assert len(seen) == 3


def test_a_damaged_job_is_refused(model: Path, begun: Path) -> None:
    path = begun / WORK / "job.json"
    path.write_text(path.read_text().replace('"seed', '"sead', 1).replace("seed", "sead"))
    message = str(run(model, begun).exception)
    assert message.startswith(f"{path}: ")
    assert "--restart" in message
    assert run(model, begun, "--restart").exit_code == 0


def test_a_second_run_of_the_same_is_refused(model: Path, tmp_path: Path, stop: Stop) -> None:
    seen = stop()
    folder = tmp_path / WORK
    folder.mkdir()
    for more in ([], ["--restart"]):
        with locked(folder / "x"):
            message = str(run(model, tmp_path, *more).exception)
        assert re.search(r"\.work/job\.json: another process is writing it; wait", message)
    assert not seen
    with locked(folder / "x"):  # another output is nobody else's
        assert run(model, tmp_path, "--name", "other").exit_code == 0


def test_checks_are_made_once(model: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.commands.quantize.check_weights", None)
    assert run(model, begun).exit_code == 0


def test_an_error_after_some_layers_says_what_is_kept(
    model: Path, tmp_path: Path, stop: Stop
) -> None:
    stop(at=1, error=ContainerError("the disk is full; free some space"))
    result = run(model, tmp_path / "out")
    assert "the disk is full" in str(result.exception)
    assert "1 of 4 layers are kept: the same command goes on" in result.stderr
    stop()
    assert "going on: 1 of 4" in run(model, tmp_path / "out").stderr


def test_an_error_before_any_layer_leaves_nothing(model: Path, tmp_path: Path, stop: Stop) -> None:
    for error in (KeyboardInterrupt(), ContainerError("no"), OSError(28, "No space left")):
        stop(at=0, error=error)
        result = run(model, tmp_path / "new" / "out")
        assert result.exit_code != 0
        assert "kept" not in result.stderr
        assert not (tmp_path / "new").exists()


def test_a_failed_write_keeps_all_layers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Stop
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ContainerError("output: can't be written (No space left on device)")

    for kind in ([], ["--shard-size", "1kB"]):
        with monkeypatch.context() as patch:
            patch.setattr("bench.quantizing.output.join", full)
            patch.setattr("bench.quantizing.output.join_shards", full)
            result = run(model, tmp_path / "out", *kind)
        assert "4 of 4 layers are kept" in result.stderr
        seen = stop()
        assert run(model, tmp_path / "out", *kind).exit_code == 0
        assert not seen


def test_a_layer_is_forgotten_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"{number}.weight": torch.randn(32, 32) for number in range(6)}, path)
    alive: list[weakref.ref[Any]] = []

    def watched(weight: Any, *arguments: Any, **options: Any) -> Any:
        assert not any(one() is not None for one in alive)
        tensor = quantize(weight, *arguments, **options)
        alive.extend([weakref.ref(weight), weakref.ref(tensor.parts["codes"])])
        return tensor

    monkeypatch.setattr(layers, "quantize", watched)
    for kind in ([], ["--shard-size", "1kB"]):
        alive.clear()
        result = run(path, tmp_path / "out", *kind)
        assert result.exit_code == 0, result.exception
        assert len(alive) == 12


def test_job_is_written_before_layers(model: Path, begun: Path) -> None:
    content = json.loads((begun / WORK / "job.json").read_text())
    job = json.loads(content["vqbench"])["job"]
    assert list(job["formats"]) == NAMES
    assert job["recipe"]["iterations"] == 2
    assert job["libraries"].startswith("torch ")
