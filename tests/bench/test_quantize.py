"""`vqbench quantize`: from a checkpoint to a container, and every way it can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from bench import cli
from bench.quantizing import layers, output
from vqkernels import container
from vqkernels.presets import parse_format
from vqkernels.quantize import Recipe, quantize, relative_error

Tensors = dict[str, torch.Tensor]

FORMAT = "rq-2x16x4"


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "0.query.weight": normal(24, 32),
        "0.query.bias": normal(24),
        "0.output.weight": normal(16, 24).to(torch.bfloat16),
        "0.output.bias": normal(3),  # of no use: another length
        "LayerNorm.weight": normal(32),
        "embeddings.word.weight": normal(50, 32),
        "final_norm.weight": normal(32, 32),
        "tiny.weight": normal(2, 64),
        "position_table": normal(8, 8),
        "conv.weight": normal(4, 4, 4),
        "mask.weight": torch.ones(16, 16, dtype=torch.int32),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    return path


def run(model: Path, folder: Path, *arguments: str, name: str = FORMAT) -> Result:
    return CliRunner().invoke(
        cli.cli, ["quantize", str(model), "-f", name, "-o", str(folder), *arguments]
    )


def test_quantises_the_linear_layers_and_says_what_it_left(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "new" / "out").iterdir()
    assert path.name == f"model.{FORMAT}.vq.safetensors"
    found = container.load(path, decoded=True)
    assert set(found) == {"0.query.weight", "0.output.weight"}
    for line in (
        "skipped 4 not a matrix",
        "skipped 1 of dtype I32, not F64, F32, F16, BF16: mask.weight",
        "skipped 1 with 'embed' in the name: embeddings.word.weight",
        "skipped 1 with 'norm' in the name: final_norm.weight",
        "skipped 1 smaller than a vector of 4: tiny.weight",
        "skipped 1 not called *.weight: position_table",
        f"wrote {path}",
    ):
        assert line in result.stderr, line


def test_holds_what_the_quantizer_gives_and_where_it_is_from(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path, "--bias", "--seed", "3", "--iterations", "4", "--name", "mine")
    assert result.exit_code == 0, result.output
    path = tmp_path / "mine.vq.safetensors"
    weight = tensors()["0.query.weight"]
    expected = quantize(weight, parse_format(FORMAT), seed=3, recipe=Recipe(iterations=4))
    found = container.load(path)
    assert torch.equal(found["0.query.weight"].decode(), expected.decode())
    assert torch.equal(found["0.query.weight"].bias, tensors()["0.query.bias"])
    assert found["0.output.weight"].bias is None
    query = next(line for line in result.stdout.splitlines() if "0.query.weight" in line)
    assert query.split()[1:5] == [
        "24x32",
        "ok",
        f"{expected.bits.per_weight():.4f}",
        f"{relative_error(weight, expected):.4f}",
    ]
    origin = container.describe(path).provenance
    assert origin["source"] == "model.safetensors"
    assert origin["source_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (origin["seed"], origin["iterations"]) == ("3", "4")
    assert (origin["method"], origin["format"]) == ("rq", FORMAT)
    assert origin["creator"].startswith("vqbench ")
    assert origin["created"].startswith("20")
    assert "torch " in origin["libraries"]
    assert "author" not in origin
    assert container.open_container(path).outline("0.query.weight").made == {
        "method": "rq",
        "seed": 3,
        "iterations": 4,
        "error": relative_error(weight, expected),
    }


def test_author_and_codes(model: Path, tmp_path: Path) -> None:
    arguments = ("--author", "Ada L.", "--iterations", "1", "--codes")
    for codes in ("packed", "ans"):
        assert run(model, tmp_path / codes, *arguments, codes).exit_code == 0
    packed, coded = (next((tmp_path / codes).iterdir()) for codes in ("packed", "ans"))
    assert container.describe(coded).provenance["author"] == "Ada L."
    for name, tensor in container.load(coded).items():
        assert torch.equal(tensor.decode(), container.load(packed)[name].decode())


def test_ans_without_its_package_is_refused_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setattr(layers, "quantize", None)
    result = run(model, tmp_path / "out", "--codes", "ans")
    assert "pip install 'vqbench[entropy]'" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_infinite_error_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "squared_errors", lambda *_: (1.0, 0.0))
    assert run(model, tmp_path).exit_code == 0
    for tensor in container.describe(next(tmp_path.glob("*.vq.safetensors"))).tensors:
        assert set(tensor.made) == {"method", "seed", "iterations"}


def test_same_seed_same_weights(model: Path, tmp_path: Path) -> None:
    sums = []
    for seed, folder in (("1", "a"), ("1", "b"), ("2", "c")):
        assert run(model, tmp_path / folder, "--seed", seed).exit_code == 0
        info = container.describe(next((tmp_path / folder).iterdir()))
        sums.append([tensor.decoded_checksum for tensor in info.tensors])
    assert sums[0] == sums[1] != sums[2]


def test_layer_takes_any_matrix_by_name(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out", "-l", "embed*", "-l", "position_*", name="vq-16x4")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").iterdir()
    assert set(container.load(path)) == {"embeddings.word.weight", "position_table"}
    assert "skipped" not in result.stderr


def test_format_file_names_the_output(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("vector_length = 4\nstages = [16]\n", encoding="utf-8")
    assert run(model, tmp_path / "out", name=str(own)).exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.own.vq.safetensors"]


def test_layers_that_cannot_hold_the_format_are_refused(model: Path, tmp_path: Path) -> None:
    some = run(model, tmp_path / "some", name="vq-128x4")
    assert some.exit_code == 0
    assert "refused 0.output.weight: 128 entries for 96 vectors a codebook" in some.stderr
    (path,) = (tmp_path / "some").iterdir()
    assert set(container.load(path)) == {"0.query.weight"}
    none = run(model, tmp_path / "none", name="vq-65536x4")
    assert none.exit_code == 1
    assert "nothing was written" in none.stderr
    assert not (tmp_path / "none").exists()


def test_method_that_is_missing_is_a_refusal(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "rotated.toml"
    own.write_text("vector_length = 4\nstages = [16]\nrotation_size = 8\n", encoding="utf-8")
    result = run(model, tmp_path / "out", name=str(own))
    assert result.exit_code in (0, 1)  # 0 once rotations are found
    assert (result.exit_code == 1) == ("rotation_size = 8" in result.stderr)


# ------------------------------------------------------------------------------------------------
# folders and shards


def shard(folder: Path, count: int = 3) -> Path:
    """The tensors as a Hugging Face folder of shards."""
    folder.mkdir()
    places = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors().items())[number::count])
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def test_folders_give_what_a_file_gives(model: Path, tmp_path: Path) -> None:
    expected = run(model, tmp_path / "file", "--name", "m")
    folder = shard(tmp_path / "sharded.v1.5")
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(model, whole / "anything.safetensors")
    for source in (folder, whole):
        result = run(source, tmp_path / "out" / source.name)
        assert result.exit_code == 0, result.output
        (path,) = (tmp_path / "out" / source.name).iterdir()
        assert path.name == f"{source.name}.{FORMAT}.vq.safetensors"
        info = container.describe(path)
        assert info.provenance["source"] == source.name
        assert [(tensor.name, tensor.checksums) for tensor in info.tensors] == [
            (tensor.name, tensor.checksums)
            for tensor in container.describe(tmp_path / "file" / "m.vq.safetensors").tensors
        ]
    assert expected.stderr.splitlines()[:-1] == result.stderr.splitlines()[:-1]


def test_source_sha256_of_shards_is_that_of_sha256sum(model: Path, tmp_path: Path) -> None:
    folder = shard(tmp_path / "sharded")
    assert run(folder, tmp_path / "out").exit_code == 0
    (path,) = (tmp_path / "out").iterdir()
    sums = subprocess.run("sha256sum *.safetensors", shell=True, cwd=folder, capture_output=True)
    assert container.describe(path).provenance["source_sha256"] == (
        hashlib.sha256(sums.stdout).hexdigest()
    )


def test_writes_shards(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "one").exit_code == 0
    result = run(model, tmp_path / "out", "--shard-size", "500B", "--bias")
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == f"model.{FORMAT}.vq"
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    assert f"wrote {folder} (" in result.stderr
    one = container.load(next((tmp_path / "one").iterdir()))
    for name, tensor in container.load(folder, decoded=True).items():
        assert torch.equal(tensor.decode(), one[name].decode())
    assert container.describe(folder).provenance["format"] == FORMAT


def test_a_set_and_a_file_do_not_replace_each_other(model: Path, tmp_path: Path) -> None:
    (tmp_path / f"model.{FORMAT}.vq").write_text("x")
    message = str(run(model, tmp_path, "--shard-size", "1kB").exception)
    assert "is a file already; choose another --name" in message
    (tmp_path / f"model.{FORMAT}.vq.safetensors").mkdir()
    assert "is a folder already" in str(run(model, tmp_path).exception)


def test_a_workload_s_name_stands_for_its_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.weights.weights_file", lambda workload: model)
    assert run(Path("minilm"), tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        f"minilm.{FORMAT}.vq.safetensors"
    ]
    monkeypatch.undo()
    assert "llama3-8b: is a workload of shapes alone" in str(
        run(Path("llama3-8b"), tmp_path).exception
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
            ["model-00002-of-00003.safetensors: is missing", "download it again"],
        ),
        (
            lambda folder: save_file(tensors(), folder / "model-00002-of-00003.safetensors"),
            ["model-00002-of-00003.safetensors: tensor", "is in model-00001-of-00003", "again"],
        ),
        (
            lambda folder: save_file(tensors(), folder / "model.safetensors"),
            ["holds both model.safetensors and", "remove"],
        ),
        (
            lambda folder: (
                [path.unlink() for path in folder.glob("model*")]
                and torch.save({}, folder / "pytorch_model.bin")
            ),
            ["holds pickles (pytorch_model.bin)", "never loads"],
        ),
    ],
    ids=["missing", "twice", "both", "pickle"],
)
def test_bad_folder(spoil: Callable[[Path], Any], words: list[str], tmp_path: Path) -> None:
    folder = shard(tmp_path / "sharded")
    spoil(folder)
    message = str(run(folder, tmp_path / "out").exception)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_a_name_given_twice_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(16, 16), "b.weight": torch.randn(16, 16)}, path)
    path.write_bytes(path.read_bytes().replace(b'"b.weight"', b'"a.weight"'))
    message = str(run(path, tmp_path / "out").exception)
    assert message.startswith(f"{path}: ")
    assert "damaged" in message


def test_a_model_that_changes_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*arguments: Any, **options: Any) -> Any:
        os.utime(model, (1, 1))
        return quantize(*arguments, **options)

    monkeypatch.setattr(layers, "quantize", changing)
    assert "was changed since it was opened" in str(run(model, tmp_path / "out").exception)


# ------------------------------------------------------------------------------------------------
# formats and recipes


def test_layers_of_other_formats(model: Path, tmp_path: Path) -> None:
    result = run(
        model,
        tmp_path,
        *("--layer-format", "*.weight=vq-16x8", "--layer-format", "*query*=vq-32x4"),
        "--name=mixed",
    )
    assert result.exit_code == 0, result.output
    path = tmp_path / "mixed.vq.safetensors"
    source = container.open_container(path)
    assert source.outline("0.query.weight").spec == parse_format("vq-32x4")
    assert source.outline("0.output.weight").spec == parse_format("vq-16x8")
    assert source.outline("0.output.weight").made["method"] == "vq"
    origin = source.info.provenance
    assert origin["format"] == f"{FORMAT} *.weight=vq-16x8 *query*=vq-32x4"
    assert origin["method"] == "vq"
    mixed = run(model, tmp_path, "--layer-format", "*query*=vq-32x4")
    assert mixed.exit_code == 0
    path = tmp_path / f"model.{FORMAT}.vq.safetensors"
    assert "method" not in container.describe(path).provenance


def test_recipe_of_file_and_options(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("iterations = 9\nbeam = 3\npropagate = false\n", encoding="utf-8")
    arguments = ["--recipe", str(file), "--set", "beam=2", "--set", "init=random"]
    assert run(model, tmp_path, *arguments, "--iterations", "4", "--name=m").exit_code == 0
    source = container.open_container(tmp_path / "m.vq.safetensors")
    told = {"iterations": 4, "beam": 2, "init": "random", "propagate": "false"}
    assert source.outline("0.query.weight").made.items() >= told.items()
    assert source.info.provenance["recipe"] == "init=random, beam=2, propagate=false"
    assert source.info.provenance["iterations"] == "4"
    recipe = Recipe(iterations=4, beam=2, init="random", propagate=False)
    weight = tensors()["0.query.weight"]
    expected = quantize(weight, parse_format(FORMAT), recipe=recipe).decode()
    assert torch.equal(source["0.query.weight"].decode(), expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "beam"], "write NAME=VALUE"),
        (["--set", "beem=4"], "unknown field 'beem'"),
        (["--set", "beam=many"], "beam must be a whole number, not 'many'"),
        (["--set", "beam=2.5"], "beam must be a whole number, not 2.5"),
        (["--set", "propagate=1"], "propagate must be true or false, not 1"),
        (["--set", "clip=inf"], "clip must be a finite number"),
        (["--set", "clip=60"], "clip 60 limits everything"),
        (["--recipe", "absent.toml"], "recipe file absent.toml: "),
        (["--layer-format", "*x*"], "format '' is unknown"),
        (["--layer-format", "*x*=vq-16x4"], "--layer-format '*x*' matches none of the 2 tensors"),
    ],
)
def test_bad_recipe_or_format(arguments: list[str], says: str, model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out", *arguments)
    assert result.exit_code != 0
    assert says in f"{result.exception}{result.stderr}"
    assert not (tmp_path / "out").exists()


def test_bad_recipe_file_is_named(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for text in ("beam = ", "beem = 4", "beam = 0"):
        file.write_text(text, encoding="utf-8")
        message = str(run(model, tmp_path / "out", "--recipe", str(file)).exception)
        assert message.startswith(f"recipe file {file}: ")
        assert "\n" not in message


def test_the_last_row_is_of_all(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path)
    found = container.load(next(tmp_path.glob("*.vq.safetensors")))
    lost = total = bits = weights = 0.0
    for name, tensor in found.items():
        weight = tensors()[name].double()
        lost += float((weight - tensor.decode()).square().sum())
        total += float(weight.square().sum())
        bits += tensor.bits.per_weight() * weight.numel()
        weights += weight.numel()
    row = next(line.split() for line in result.stdout.splitlines() if "all" in line.split())
    assert row[3:5] == [f"{bits / weights:.4f}", f"{lost / total:.4f}"]


def test_what_int8_entries_cost_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "rounding_cost", lambda weight, tensor: 0.25)
    int8 = "vq-16x4,codebook_dtype=int8"
    result = run(model, tmp_path, "--layer-format", "*query*=vq-16x4", name=int8)
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert rows["layer"][-3:] == ["int8", "cost", "%"]
    assert rows["0.output.weight"][-1] == "+25.00"
    assert rows["0.query.weight"][-1] == "-"
    assert 0 < float(rows["all"][-1]) < 25
    assert "int8" not in run(model, tmp_path, name="vq-16x4").stdout


# ------------------------------------------------------------------------------------------------
# bad input


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def rewrite(**changes: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: save_file({**tensors(), **changes}, path)


def spoiled(value: float) -> torch.Tensor:
    weight = tensors()["0.query.weight"]
    weight[5, 7] = value
    return weight


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, ["there is no such file", "give the path"]),
        (lambda path: (path.unlink(), path.mkdir()), ["holds no .safetensors file", "give"]),
        (damage(lambda content: content[:-100]), ["truncated", "download it again"]),
        (damage(lambda content: content[:5]), ["truncated", "download it again"]),
        (damage(lambda content: b""), ["truncated", "download it again"]),
        (damage(lambda content: b"\xff" * 8 + content[8:]), ["damaged", "download it again"]),
        (damage(lambda content: pickle.dumps({})), ["pickle", "never loads", "save_file"]),
        (
            rewrite(**{"0.query.weight": spoiled(float("nan"))}),
            ["tensor '0.query.weight'", "NaN", "repair"],
        ),
        (
            rewrite(**{"0.query.weight": spoiled(float("inf"))}),
            ["tensor '0.query.weight'", "infinity", "repair"],
        ),
    ],
    ids=["absent", "folder", "cut", "stub", "empty", "length", "pickle", "nan", "inf"],
)
def test_bad_model(
    spoil: Callable[[Path], Any],
    words: list[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(model)
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["vqbench", "quantize", str(model), "-f", FORMAT, "-o", str(out)]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {model}: ")
    assert all(word in line for word in words), line
    assert not out.exists()


def test_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "boom",)

    path = tmp_path / "model.safetensors"
    torch.save({"x.weight": Bomb()}, path)
    assert "never loads" in str(run(path, tmp_path / "out").exception)
    assert not (tmp_path / "boom").exists()


def test_bad_bias_is_named(model: Path, tmp_path: Path) -> None:
    save_file({**tensors(), "0.query.bias": torch.full((24,), float("nan"))}, model)
    message = str(run(model, tmp_path / "out", "--bias").exception)
    assert message.startswith(f"{model}: tensor '0.query.bias' holds NaN")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-l", "nothing*"], ["no tensor matches nothing*", "--layer"]),
        (["-l", "0.query.bias"], ["no tensor matches", "1 not a matrix"]),
        (["-f", "vq-1"], ["format 'vq-1' is unknown"]),
    ],
)
def test_bad_arguments(arguments: list[str], words: list[str], model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out", *arguments)
    assert all(word in str(result.exception) for word in words), result.exception
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "x\n"])
def test_bad_name_is_a_usage_error(name: str, model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(model, tmp_path / "out", "--name", name)
    if name != "..":  # "...vq.safetensors" is a name, if an odd one
        assert result.exit_code == 2
        assert sorted(tmp_path.rglob("*")) == before


def test_model_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.vq.safetensors"
    save_file(tensors(), path)
    before = path.read_bytes()
    result = run(path, tmp_path, "--name", "model")
    assert "is the model itself" in str(result.exception)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------
# the output folder


def test_output_below_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{tmp_path / 'file'}: is a file" in str(run(model, folder).exception)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert f"{folder}: can't be written to" in str(run(model, folder).exception)


def test_unwritable_folder_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.os, "access", lambda path, mode: mode == os.R_OK)
    monkeypatch.setattr(layers, "quantize", None)
    assert f"{tmp_path}: can't be written to" in str(run(model, tmp_path / "out").exception)


def test_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    message = str(run(model, tmp_path / "out").exception)
    assert "needs " in message
    assert "100 left; free some space" in message
    assert sorted(tmp_path.rglob("*")) == before
