"""A stored model as a workload, and `vqbench run --model`."""

from __future__ import annotations

import functools
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import bench.commands.run as command
from autotune.bandwidth import Bandwidth
from autotune.timers import Budget
from bench import model
from bench.cli import cli, main
from bench.model import model_selection, model_workload
from bench.records import read_records
from bench.weights import make_weight
from bench.workload import STORED
from tests.autotune import zoo
from vqkernels.container import save
from vqkernels.container.shards import save_shards
from vqkernels.errors import ContainerError, SpecError
from vqkernels.kernel import registry
from vqkernels.presets import parse_format
from vqkernels.source import Outline, TensorSource, outline_of
from vqkernels.tensor import QuantizedTensor, random_tensor

QUICK = ("--time", "0.001", "--samples", "7")
SHAPES = {
    "self_attn.q_proj": (24, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 24),
    "mlp.down_proj": (16, 24),
}
KINDS = [f"model.layers.0.{name}" for name in (*SHAPES, "mlp.up_proj")] + [
    "model.layers.1.mlp.up_proj"
]


@pytest.fixture(scope="module")
def tensors() -> dict[str, QuantizedTensor]:
    """Two blocks; the second stores its up_proj in another format."""
    made = {}
    for block in range(2):
        shapes = SHAPES | {"mlp.up_proj": (24, 16)}
        for seed, (name, (n, k)) in enumerate(shapes.items()):
            other = block == 1 and name == "mlp.up_proj"
            spec = parse_format("vq-16x4" if other else "rq-2x8x4")
            made[f"model.layers.{block}.{name}"] = random_tensor(
                spec, n, k, seed=10 * block + seed, bias=name.endswith("q_proj"), fit=False
            )
    return made


@pytest.fixture
def path(tmp_path, tensors) -> Path:
    path = tmp_path / "private" / "tiny.vq.safetensors"
    path.parent.mkdir()
    save(path, tensors)
    return path


def names(path: Path, *layers: str, fuse: bool = False) -> dict[str, int]:
    cases = model_selection(path, layers, (), fuse=fuse).cases()
    return {layer.name: layer.stands_for for _, layer, name in cases if name == STORED}


def test_a_layer_a_matrix_in_its_own_format(path, tensors):
    workload = model_workload(path)
    assert workload.name == "tiny.vq.safetensors"
    assert str(path.parent) not in repr((workload.about, workload.source, workload.layers))
    assert [layer.name for layer in workload.layers] == list(tensors)
    for layer in workload.layers:
        tensor = tensors[layer.name]
        assert (layer.n, layer.k, layer.spec(STORED)) == (tensor.n, tensor.k, tensor.spec)


def test_a_folder_is_called_as_it_is_called(tmp_path, tensors, monkeypatch):
    save_shards(tmp_path / "tiny", tensors, shard_bytes=1 << 20)
    monkeypatch.chdir(tmp_path / "tiny")
    assert model_workload(Path()).name == "tiny"


def test_nothing_quantised_is_said(monkeypatch):
    monkeypatch.setattr(model, "open_source", lambda path: {})
    with pytest.raises(ContainerError, match=r"^empty: holds no quantised matrix"):
        model_workload(Path("empty"))


def test_one_of_each_kind_stands_for_all(path):
    assert names(path) == dict.fromkeys(KINDS[:5], 2) | dict.fromkeys(KINDS[5:], 1)


def test_any_layer_is_chosen_by_glob(path):
    assert names(path, "*.1.*.[qk]_proj", "*.0.mlp.up_proj") == {
        "model.layers.0.mlp.up_proj": 1,
        "model.layers.1.self_attn.q_proj": 1,
        "model.layers.1.self_attn.k_proj": 1,
    }
    with pytest.raises(SpecError, match=r"no layer matches x\*; there are: model\.layers\.0\.self"):
        names(path, "x*")


def test_many_layers_are_not_all_listed(tmp_path):
    path = tmp_path / "many.safetensors"
    save(path, {f"{i}": random_tensor(parse_format("vq-2x4"), 4, 4) for i in range(50)})
    with pytest.raises(SpecError, match=r"38, 39 and 10 more$"):
        names(path, "x*")


def test_layers_of_one_input_and_format_are_fused(path, tensors):
    fused = names(path, fuse=True)
    assert fused["model.layers.0.self_attn.qkv_proj"] == 2
    assert not any(
        name.endswith(("q_proj", "k_proj", "v_proj")) - name.endswith("qkv_proj") for name in fused
    )
    workload = model_workload(path).fused()
    layer = next(one for one in workload.layers if one.name.endswith("1.self_attn.qkv_proj"))
    weight = make_weight(workload, layer, layer.part_spec(STORED))
    assert (weight.codes, weight.relative_error) == ("trained", None)
    apart = [tensors[part.name].decode() for part in layer.parts]
    assert torch.equal(weight.tensor.decode(), torch.cat(apart))


def test_layers_of_different_formats_stay_apart(tmp_path, tensors):
    path = tmp_path / "mixed.safetensors"
    own = tensors["model.layers.1.mlp.up_proj"]
    pair = {"a.gate_proj": tensors["model.layers.0.mlp.up_proj"], "a.up_proj": own}
    save(path, pair | {"b.gate_proj.weight": own, "b.up_proj.weight": own, "c.gate_proj": own})
    whole = {"b.gate_up_proj.weight"}
    assert set(names(path, fuse=True)) == whole | {"a.gate_proj", "a.up_proj", "c.gate_proj"}
    save(path, {"a.up_proj": own})
    with pytest.raises(SpecError, match="names no layers that run as one"):
        names(path, fuse=True)


# ------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def run(tmp_path, monkeypatch):
    kernels = [registry()["torch/dense"]]
    monkeypatch.setattr(command, "matching_kernels", lambda patterns, device=None: kernels)
    monkeypatch.setattr(command, "where", lambda device, threads: zoo.DEVICE)
    monkeypatch.setattr(command, "Budget", functools.partial(Budget, warmup_s=0.001))
    monkeypatch.setattr(command, "measure_bandwidth", lambda device: Bandwidth(5e17, 1e18, 1))
    folder = ["--results", str(tmp_path / "results")]
    return lambda *words: CliRunner().invoke(cli, ["run", *QUICK, *folder, *map(str, words)])


def results(tmp_path: Path) -> list[dict]:
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    return read_records(path)


def test_records_and_the_table_say_what_was_run(run, path, tmp_path, tensors):
    done = run("--model", path, "-o", "md")
    assert done.exit_code == 0, done.output
    assert "tiny.vq.safetensors: 12 matrices, as they are stored; one of each of 7 kinds" in (
        done.stderr
    )
    # of the shape 24x16, q_proj and one up_proj share a format, the other up_proj doesn't
    assert [line.split(" | ")[1] for line in done.stdout.splitlines()[2:]] == [
        "2 of 24x16, for 3",
        "2 of 8x16, for 4",
        "2 of 16x24, for 4",
        "model.layers.1.mlp.up_proj 24x16",
    ]
    records = results(tmp_path)
    assert [one["layer"] for one in records] == sorted(KINDS, key=list(tensors).index)
    assert {one["status"] for one in records} == {"ok"}
    for one in records:
        tensor = tensors[one["layer"]]
        assert (one["workload"], one["format"]) == ("tiny.vq.safetensors", "as stored")
        assert (one["codes"], one["relative_error"]) == ("trained", None)
        assert one["spec"] == json.loads(json.dumps(tensor.spec.to_dict()))
        assert one["effective_bits"] == tensor.bits.per_weight()
        assert one["stands_for"] == (1 if "up_proj" in one["layer"] else 2)
        assert str(path.parent) not in json.dumps({**one, "argv": None})


def test_one_matrix_is_in_memory_at_a_time(run, path, monkeypatch, tensors):
    class Watched(TensorSource):
        held: weakref.ref | None = None

        def __getitem__(self, name: str) -> QuantizedTensor:
            read.append(name)
            assert self.held is None or self.held() is None, "the last one is still there"
            tensor = tensors[name].to("cpu").replace_parts()
            self.held = weakref.ref(tensor)
            return tensor

        def __iter__(self):
            return iter(tensors)

        def __len__(self) -> int:
            return len(tensors)

        def outline(self, name: str) -> Outline:
            return outline_of(tensors, name)

    read: list[str] = []
    monkeypatch.setattr(model, "open_source", lambda path: Watched())
    done = run("--model", path, "-l", "*.0.*", "-m", "1", "-m", "2")
    assert done.exit_code == 0, done.output
    assert read == list(tensors)[:6]


@pytest.mark.parametrize("words", [("-w", "minilm"), ("-f", "vq-16x4")])
def test_a_model_has_its_own_layers_and_formats(run, path, words):
    done = run("--model", path, *words)
    assert done.exit_code == 2
    assert "drop -w and -f" in done.stderr


@pytest.mark.parametrize("other", ["tune", "gate", "predict"])
def test_other_commands_say_that_they_take_none(path, other):
    done = CliRunner().invoke(cli, [other, "--model", str(path)])
    assert done.exit_code == 2
    assert "No such option" in done.stderr


def test_damage_is_one_line_and_what_was_measured_before_is_kept(
    run, path, tmp_path, monkeypatch, capsys
):
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(ContainerError, match="truncated"):
        model_workload(path)
    with pytest.raises(ContainerError, match="no such"):
        model_workload(tmp_path / "absent")
    good, bad = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, _ = header[f"{bad}/codebook_0"]["data_offsets"]
    flipped = bytearray(content)
    flipped[8 + length + start] ^= 1
    path.write_bytes(flipped)
    words = ["run", "--model", str(path), "-l", good, "-l", bad, "-k", "torch/dense", *QUICK]
    monkeypatch.setattr(sys, "argv", ["vqbench", *words, "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {path}: tensor {bad!r}: ")
    assert "checksum" in line
    assert [one["layer"] for one in results(tmp_path)] == [good]
