"""Workloads: true shapes, and files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from bench.weights import weights_file
from bench.workload import load_workload, workload_names
from vqkernels.errors import SpecError
from vqkernels.presets import PRESETS

# hidden, key-value width, intermediate, blocks, from each model's config.json
LLAMAS = {
    "llama2-7b": (4096, 4096, 11008, 32),
    "llama3-8b": (4096, 8 * 128, 14336, 32),
    "llama3-70b": (8192, 8 * 128, 28672, 80),
    "mistral-7b": (4096, 8 * 128, 14336, 32),
    "qwen2.5-7b": (3584, 4 * 128, 18944, 28),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_decoder_blocks_have_their_models_shapes(name: str) -> None:
    hidden, kv, inner, blocks = LLAMAS[name]
    workload = load_workload(name)
    assert workload.blocks == blocks
    assert {layer.name: (layer.n, layer.k) for layer in workload.layers} == {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


@pytest.mark.parametrize("name", LLAMAS)
def test_layers_of_one_input_run_as_one(name: str) -> None:
    hidden, kv, inner, _ = LLAMAS[name]
    fused = load_workload(name).fused()
    assert [(layer.name, layer.shape) for layer in fused.layers] == [
        ("qkv_proj", (hidden, kv, kv, hidden)),
        ("o_proj", (hidden, hidden)),
        ("gate_up_proj", (inner, inner, hidden)),
        ("down_proj", (hidden, inner)),
    ]
    assert fused.layers[0].n == hidden + 2 * kv
    assert fused.layers[0].spec("aqlm-2x8").group_size == kv
    assert fused.layers[1].spec("aqlm-2x8") == PRESETS["aqlm-2x8"]


def test_a_workload_of_single_layers_can_not_be_fused() -> None:
    with pytest.raises(SpecError, match="workload toy names no layers"):
        load_workload("toy").fused()


@pytest.mark.parametrize(
    ("layers", "words"), [('["x", "z"]', "no layer 'z'"), ('["x", "y"]', "not one input")]
)
def test_layers_that_can_not_be_one(layers: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'about = "a"\nsource = "s"\nblocks = 3\n[[layer]]\nname = "x"\nn = 5\nk = 7\n'
        f'[[layer]]\nname = "y"\nn = 5\nk = 8\n[[fused]]\nname = "xy"\nlayers = {layers}\n',
        encoding="utf-8",
    )
    with pytest.raises(SpecError, match=words):
        load_workload(str(path))


def test_seed_blocks_have_the_seeds_weights() -> None:
    sizes = {
        name: sum(layer.n * layer.k for layer in load_workload(name).layers)
        for name in ("toy", "llama2-7b", "opt-125m")
    }
    assert sizes == {"toy": 256, "llama2-7b": 202_375_168, "opt-125m": 7_077_888}


def test_minilm_names_every_matrix_of_its_file_with_its_shape() -> None:
    workload = load_workload("minilm")
    path = weights_file(workload)
    assert path is not None
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    linear = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not name.startswith("embeddings.")
    }
    assert {layer.tensor: [layer.n, layer.k] for layer in workload.layers} == linear
    assert len({layer.name for layer in workload.layers}) == len(workload.layers) == 37


def test_every_workload_loads_by_name() -> None:
    assert {load_workload(name).name for name in workload_names()} == set(workload_names())
    assert {*LLAMAS, "minilm", "opt-125m", "toy"} <= set(workload_names())


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'about = "a"\nsource = "s"\nblocks = 3\n[[layer]]\nname = "x"\nn = 5\nk = 7\n',
        encoding="utf-8",
    )
    workload = load_workload(str(path))
    assert (workload.name, workload.blocks, workload.package) == ("mine", 3, None)
    assert [(layer.name, layer.n, layer.k) for layer in workload.layers] == [("x", 5, 7)]


@pytest.mark.parametrize(
    "text",
    [
        "about = ",
        'about = "a"\nsource = "s"\nblocks = 1\n',
        'about = "a"\nsource = "s"\n[[layer]]\nname = "x"\nn = 5\nk = 7\n',
        'about = "a"\nsource = "s"\nblocks = 1\nsheep = 2\n[[layer]]\nname = "x"\nn = 5\nk = 7\n',
        'about = "a"\nsource = "s"\nblocks = 1\n[[layer]]\nname = "x"\nn = 5\n',
    ],
    ids=["toml", "no-layers", "no-blocks", "unknown-field", "no-k"],
)
def test_bad_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=r"workload file .*bad\.toml") as caught:
        load_workload(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "nope.toml"])
def test_unknown_workload_lists_the_known(name: str) -> None:
    with pytest.raises(SpecError, match=r"unknown; use one of .*llama2-7b"):
        load_workload(name)
