"""`vqbench import`: a checkpoint as a container, with all that belongs to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from bench import conversion
from bench.cli import cli
from tests.bench.checkpoints import CONFIG, DENSE, O, Q, assert_same, make_aqlm, make_vptq
from vqkernels import container
from vqkernels.container.checksums import raw_bytes
from vqkernels.dense import DenseFile
from vqkernels.errors import ContainerError, VqError
from vqkernels.formats import CheckpointSource, open_source
from vqkernels.source import TensorSource
from vqkernels.tensor import QuantizedTensor

MAKERS: dict[str, Callable[[Path], dict[str, QuantizedTensor]]] = {
    "vptq": make_vptq,
    "vptq in shards": lambda folder: make_vptq(folder, shard_bytes=500),
    "aqlm": make_aqlm,
}


def run(folder: Path, target: Path, *arguments: str, command: str = "import") -> Result:
    return CliRunner().invoke(cli, [command, str(folder), "-o", str(target), *arguments])


def imported(folder: Path, target: Path, *arguments: str) -> Result:
    result = run(folder, target, *arguments)
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert {path.name for path in target.parent.iterdir()} == {folder.name, target.name}
    return result


def refused(folder: Path, target: Path, says: str, *arguments: str) -> None:
    """It fails with these words, and makes nothing."""
    before = {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()}
    result = run(folder, target, *arguments)
    assert result.exit_code != 0
    told = str(result.exception) if isinstance(result.exception, VqError) else result.stderr
    assert re.search(says, told), told
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in target.parent.rglob("*") if path.is_file()} == set(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_vptq(tmp_path / "tiny")
    return tmp_path / "tiny"


def damage(folder: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a checkpoint in one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[key] = change(tensors[key]).clone()
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------
# what is made


@pytest.mark.parametrize("maker", MAKERS)
def test_a_checkpoint_as_a_folder(maker: str, tmp_path: Path) -> None:
    tensors = MAKERS[maker](tmp_path / "tiny")
    result = imported(tmp_path / "tiny", tmp_path / "out", "--shard-size", "200")
    found = open_source(tmp_path / "out")
    assert isinstance(found, container.Container)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    dense = load_file(tmp_path / "out/dense.safetensors")
    assert set(dense) == set(DENSE)
    for key, value in DENSE.items():
        assert (dense[key].dtype, dense[key].shape) == (value.dtype, value.shape)
        assert raw_bytes(dense[key]) == raw_bytes(value)
    size = sum(value.nbytes for value in DENSE.values())
    assert f"kept: {len(DENSE)} dense tensors, {size} bytes" in result.stderr


def test_the_files_that_a_model_needs_besides(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    (folder / "vocab.json").symlink_to(folder / "tokenizer.json")  # as in the hub's cache
    (folder / "tokenizer_folder.json").mkdir()
    imported(folder, tmp_path / "out")
    config = (tmp_path / "out/config.json").read_bytes()
    assert config == (folder / "config.json").read_bytes()
    assert (tmp_path / "out/vocab.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "out/vocab.json").is_symlink()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert not names & {"modeling_tiny.py", "model.safetensors", "tokenizer_folder.json"}


def test_a_checkpoint_as_one_file(folder: Path, tmp_path: Path) -> None:
    result = imported(folder, tmp_path / "out.safetensors", "--codes", "ans")
    found = container.open_container(tmp_path / "out.safetensors")
    for name, tensor in MAKERS["vptq"](tmp_path / "again").items():
        assert_same(found[name], tensor)
    assert f"left out (OUT holds quantised matrices alone): {len(DENSE)} dense" in result.stderr


def test_where_it_came_from_is_kept_but_not_where_it_lay(folder: Path, tmp_path: Path) -> None:
    imported(folder, tmp_path / "out")
    info = container.open_container(tmp_path / "out").info
    told = dict(info.provenance)
    assert told.pop("created").startswith("20")
    assert told.pop("libraries").startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert re.fullmatch("[0-9a-f]{64}", told.pop("dense_sha256"))
    assert told.pop("creator").startswith("vqbench ")
    assert told == {
        "source": "tiny",
        "quant_method": "vptq",
        "transformers_version": CONFIG["transformers_version"],
    }


def test_what_it_prints(folder: Path, tmp_path: Path) -> None:
    result = imported(folder, tmp_path / "out")
    rows = [line.split() for line in result.stdout.splitlines()]
    (row,) = (row for row in rows if "method=vptq" in row)
    tensors = open_source(tmp_path / "out")
    total = sum((tensors[name].bits for name in (Q, O)), start=type(tensors[Q].bits)())
    assert row[-6] == "2"  # layers, then bits
    assert float(row[-2]) == round(total.per_weight(), 4)
    sizes = [
        container.open_container(tmp_path / "out").outline(name).stored_bytes for name in (Q, O)
    ]
    assert int(row[-1].replace(",", "")) == sum(sizes)
    assert "every matrix reads back equal" in result.stderr


def test_an_imported_folder_becomes_a_checkpoint_again(folder: Path, tmp_path: Path) -> None:
    imported(folder, tmp_path / "out")
    result = run(tmp_path / "out", tmp_path / "back", "--to", "vptq", command="convert")
    assert result.exit_code == 0, result.output
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny", "back"))
    assert set(first) == set(second)
    for key, value in first.items():
        assert raw_bytes(second[key]) == raw_bytes(value), key
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert content == json.loads((folder / "config.json").read_text())
    result = run(tmp_path / "out", tmp_path / "x.npz", command="convert")
    assert "left out what isn't quantised" in result.stderr


# ------------------------------------------------------------------------------------------------
# what can't be read


def test_a_module_that_can_not_be_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    damage(folder, f"{O}.centroids.weight", lambda book: book.fill_(float("nan")))
    refused(folder, tmp_path / "out", f"'{O}.centroids.weight' holds NaN")
    result = imported(folder, tmp_path / "out", "--skip-bad")
    assert list(open_source(tmp_path / "out")) == [Q]
    assert f"refused {O}: " in result.stderr
    assert "holds NaN" in result.stderr
    assert not [key for key in DenseFile(tmp_path / "out/dense.safetensors") if key.startswith(O)]


@pytest.mark.parametrize("maker", ["vptq", "aqlm"])
def test_headers_of_a_module_that_are_wrong(maker: str, tmp_path: Path) -> None:
    MAKERS[maker](tmp_path / "tiny")
    key = f"{O}.perm" if maker == "vptq" else f"{O}.scales"
    damage(tmp_path / "tiny", key, lambda value: value[:-1])
    refused(tmp_path / "tiny", tmp_path / "out", f"tensor '{key}' is ")
    result = imported(tmp_path / "tiny", tmp_path / "out", "--skip-bad")
    assert list(open_source(tmp_path / "out")) == [Q]
    assert f"refused {O}: " in result.stderr
    assert set(DenseFile(tmp_path / "out/dense.safetensors")) == set(DENSE)


def test_a_checkpoint_of_which_nothing_can_be_read(folder: Path, tmp_path: Path) -> None:
    for name in (Q, O):
        damage(folder, f"{name}.centroids.weight", lambda book: book.fill_(float("nan")))
    refused(folder, tmp_path / "out", "tiny: no module can be read; .*holds NaN", "--skip-bad")


def test_what_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", tmp_path / "out", "none: is not a folder")
    imported(folder, tmp_path / "out")
    refused(tmp_path / "out", tmp_path / "again", "out: is a container already; .*vqbench convert")
    result = run(folder, tmp_path / "out.safetensors", "--shard-size", "1GB")
    assert result.exit_code == 2
    assert "don't call OUT *.safetensors" in result.stderr


# ------------------------------------------------------------------------------------------------
# nothing is lost


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    imported(folder, tmp_path / "out")
    refused(folder, tmp_path / "out", "is there already")
    refused(folder, folder, "is what is read, or holds it", "--force")
    imported(folder, tmp_path / "out", "--force", "--codes", "ans")


@pytest.mark.parametrize("change", [lambda value: value + 1, torch.flatten])
def test_a_dense_tensor_that_does_not_read_back(
    change: Callable[[torch.Tensor], torch.Tensor],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DenseFile, "__getitem__", lambda _, key: change(DENSE[key]))
    refused(folder, tmp_path / "out", "dense tensor 'lm_head.weight' doesn't read back")
    imported(folder, tmp_path / "out", "--no-verify")


def test_ctrl_c_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = conversion._WRITERS["model"]

    def interrupt(path: Path, view: TensorSource, *rest: object) -> None:
        write(path, view, *rest)  # type: ignore[arg-type]  # as it came
        raise KeyboardInterrupt

    monkeypatch.setitem(conversion._WRITERS, "model", interrupt)
    refused(folder, tmp_path / "out", "interrupted: .*out was not written")
    assert run(folder, tmp_path / "out").exit_code == 130
    assert set(tmp_path.iterdir()) == {folder}


def test_a_dense_file_that_is_damaged(folder: Path, tmp_path: Path) -> None:
    imported(folder, tmp_path / "out")
    path = tmp_path / "out/dense.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContainerError, match=r"dense\.safetensors: is truncated.*; copy "):
        DenseFile(path)
    assert isinstance(open_source(folder), CheckpointSource)
