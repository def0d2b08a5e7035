from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.quality.loading import decoded, load_model
from tests.bench.quality import tiny
from vqkernels.presets import parse_format
from vqkernels.tensor import random_tensor


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("loading") / "tied", tied=True)


def broken(folder: Path):
    return tiny.damaged(tiny.exact(tiny.weights(folder)["model.embed_tokens.weight"]))


def test_weights_begin_where_torch_begins_them(tied: Path) -> None:
    # where a product's rounding is the same for equal weights; a mapped file's begin anywhere
    model = load_model(tied, "AutoModelForCausalLM")
    assert {one.data_ptr() % 64 for one in model.module.parameters()} == {0}
    assert model.module.lm_head.weight is model.module.get_input_embeddings().weight


@pytest.mark.parametrize("kernels", [False, True])
def test_a_product_that_shares_an_embeddings_weight_leaves_that_dense(
    tied: Path, kernels: bool
) -> None:
    model = load_model(tied, "AutoModelForCausalLM")
    table = model.module.get_input_embeddings()
    before = table.weight.clone()
    assert model.put({"lm_head.weight": broken(tied)}, kernels=kernels) == ["lm_head.weight"]
    assert torch.equal(table.weight, before)
    head = model.module.lm_head
    weight = head.quantized.decode(torch.float32) if kernels else head.weight
    assert torch.equal(weight, broken(tied).decode(torch.float32))


def test_an_embedding_is_the_head_too_where_the_file_holds_it_once(tied: Path) -> None:
    model = load_model(tied, "AutoModelForCausalLM")
    model.put({"model.embed_tokens": broken(tied)})
    assert torch.equal(
        model.module.get_input_embeddings().weight, broken(tied).decode(torch.float32)
    )
    assert model.module.lm_head.weight is model.module.get_input_embeddings().weight


def test_a_tensors_bias_takes_the_place_of_the_layers(tied: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    bias = torch.arange(32.0)
    exact = tiny.exact(tiny.weights(tied)[f"{name}.weight"])
    tensor = exact.replace_parts(bias=bias)
    model = load_model(tied, "AutoModelForCausalLM")
    model.put({name: tensor})
    assert torch.equal(model.module.get_submodule(name).bias, bias)


@pytest.mark.parametrize("preset", ["vq-256x8", "vptq-65536-256", "pq-m16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_in_pieces_is_the_decode(
    preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.quality.loading._PIECE", 1 << 10)
    tensor = random_tensor(parse_format(preset), 100, 96, fit=False)
    assert torch.equal(decoded(tensor, dtype), tensor.decode().to(dtype))
