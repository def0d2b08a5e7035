"""VPTQ checkpoints that are refused: configs that are not the tensors', and invalid data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vqkernels.formats.vptq_layers import (
    OUTLIERS,
    PLAIN,
    UNPACKED,
    case_of,
    make_layer,
    refusal,
    write_folder,
)
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.formats import Checkpoint, open_source
from vqkernels.formats.vptq import VptqSource

# ------------------------------------------------------------------------------------------------
# configs that contradict themselves or the tensors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"remove": "enable_norm"},
            "field 'enable_norm' is missing; correct it, or quantise again",
        ),
        ({"indices_sign": True}, "field 'indices_sign' is unknown"),
        ({"vector_quant_dim": "in"}, 'vector_quant_dim is not "out"'),
        ({"in_features": "40"}, "in_features must be a whole number up to"),
        ({"in_features": True}, "in_features must be a whole number up to"),
        ({"in_features": 40.0}, "in_features must be a whole number up to"),
        ({"in_features": 10**400}, "in_features must be a whole number up to"),
        ({"in_features": None}, "in_features must be a whole number up to"),
        ({"in_features": 0}, "in_features must be at least 1"),
        ({"out_features": -2}, "out_features must be a whole number up to"),
        ({"vector_lens": [4]}, "vector_lens must be a list of two"),
        ({"vector_lens": [-1, "4"]}, "vector_lens must be a whole number"),
        ({"vector_lens": [-1, -1]}, "vector_length must be at least 1"),
        ({"num_centroids": 32}, "num_centroids must be a list of two"),
        ({"num_centroids": [-1, 1]}, "num_centroids names 1 entries"),
        ({"num_centroids": [-1, 1 << 17]}, "num_centroids names 131072 entries"),
        ({"num_res_centroids": [8, 8]}, "num_res_centroids names residuals of outliers"),
        ({"enable_perm": 1}, "enable_perm must be true or false, not 1"),
        ({"norm_dim": 2}, "norm_dim must be 0 (by column) or 1 (by row), not 2"),
        ({"norm_dim": True}, "norm_dim must be 0"),
        ({"group_num": 3}, "3 groups of 40 columns and 0 outlier columns are not 40"),
        ({"group_num": 0}, "groups must be at least 1"),
        ({"group_num": 3, "group_size": -1}, "3 groups of 13 columns"),
        ({"outlier_size": 40, "group_size": -1}, "group_size must be at least 1"),
        ({**OUTLIERS, "outlier_size": 0, "group_size": 40}, "name outliers, but outlier_size is 0"),
        ({**OUTLIERS, "num_centroids": [65537, 32]}, "of 65537 entries in vectors of 3"),
        # the tensors are of another layer
        ({"in_features": 41, "group_size": 41}, "but config.json asks for int32 [1, 6, 11]"),
        ({"out_features": 30}, "'m.q.indices' is int32 [1, 6, 10], but config.json asks for int32"),
        ({"out_features": 1 << 32}, "'m.q.indices' is int32 [1, 6, 10], but"),
        ({"num_centroids": [-1, 64]}, "'m.q.centroids.weight' is float16 [1, 128], but"),
        ({"num_res_centroids": [-1, -1]}, "'m.q.indices' is int32 [1, 6, 10], but"),
        ({"num_res_centroids": [-1, 16]}, "'m.q.indices' is int32 [1, 6, 10], but"),
        ({"enable_perm": False}, "tensor 'm.q.perm' is there, but config.json asks for none"),
        ({"enable_norm": False}, "tensor 'm.q.weight_bias' is there, but config.json"),
        ({"norm_dim": 1}, "'m.q.weight_scale' is float16 [40], but config.json asks for"),
        ({"bias": False}, "tensor 'm.q.bias' is there, but config.json asks for none"),
        (OUTLIERS, "'m.q.indices' is int32 [1, 6, 10], but config.json asks for int32 [1, 6, 9]"),
        (UNPACKED, "'m.q.indices' is int32 [1, 6, 10], but config.json asks for int16 or uint16"),
    ],
)
def test_a_config_that_is_not_the_layers_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"config_for_layers": []}, "config_for_layers is no JSON object"),
        ({"shared_layer_config": 3}, "shared_layer_config is no JSON object"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is no list of names"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert is no list of names"),
        ({"config_for_layers": {}}, "names no module of the checkpoint"),
        ({"config_for_layers": {"m.q": None}}, "module 'm.q': must be a JSON object, not NoneType"),
        ({"config_for_layers": {"m.k": PLAIN}}, "tensor 'm.k.centroids.weight' is missing"),
        ({"quant_method": "aqlm?"}, "quant_method 'aqlm?' is not one that vqbench reads"),
    ],
)
def test_a_quantization_config_that_is_none_is_refused(
    quantization: dict[str, Any], says: str, tmp_path: Path
) -> None:
    state, _ = make_layer(case_of())
    write_folder(tmp_path, [("m.q", PLAIN, state)])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= quantization
    path.write_text(json.dumps(config))
    with pytest.raises(VqError) as caught:
        open_source(tmp_path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_source_is_of_its_own_method_only(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
    with pytest.raises(ContainerError, match="quant_method is 'aqlm', not 'vptq'"):
        VptqSource(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("m.q.extra", "tensor 'm.q.extra' is there, but config.json asks for none"),
        ("m.q.outlier_centroids.weight", "tensor 'm.q.outlier_centroids.weight' is there"),
        ("m.q.lora.weight", "'m.q.lora.weight' lies in module 'm.q', which is quantised"),
        ("m.k.centroids.weight", "module 'm.k' holds VPTQ tensors, but has no entry"),
    ],
)
def test_stray_tensors_are_refused(key: str, says: str, tmp_path: Path) -> None:
    state, _ = make_layer(case_of())
    write_folder(tmp_path, [("m.q", PLAIN, state)], dense={key: torch.ones(2)})
    with pytest.raises(ContainerError) as caught:
        open_source(tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("centroids.weight", torch.float64),
        ("res_centroids.weight", torch.bfloat16),
        ("weight_scale", torch.float32),
        ("bias", torch.float32),
        ("perm", torch.float16),
        ("outlier_indices", torch.bfloat16),
        ("indices", torch.int64),
    ],
)
def test_another_dtype_is_refused(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = case_of(**OUTLIERS)
    state, _ = make_layer(case)
    state[key] = state[key].to(dtype)
    write_folder(tmp_path, [("m.q", case.config, state)])
    with pytest.raises(ContainerError) as caught:
        open_source(tmp_path)
    name = str(dtype).removeprefix("torch.")
    assert f"model.safetensors: tensor 'm.q.{key}' is {name} [" in str(caught.value)


# ------------------------------------------------------------------------------------------------
# data that is invalid


def damaged(folder: Path, key: str, value: Any, at: tuple[int, ...], **changes: Any) -> str:
    case = case_of(**changes)
    state, _ = make_layer(case)
    write_folder(folder, [("m.q", case.config, state)])
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors[f"m.q.{key}"]
    tensor[at] = torch.tensor(value).to(torch.uint16).view(tensor.dtype) if changes else value
    save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    with pytest.raises(TensorError) as caught:
        source["m.q"]
    message = str(caught.value)
    assert message.startswith(f"{folder}/model.safetensors: tensor 'm.q.{key}' ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [32, 257, 65535])
def test_a_code_out_of_range_is_caught(value: int, tmp_path: Path) -> None:
    says = damaged(tmp_path, "indices", value, (0, 2, 3), **UNPACKED)
    assert f"reaches {value}, but its codebook has 32 entries" in says


@pytest.mark.parametrize("value", [8, 256, 32768])
def test_a_residual_code_out_of_range_is_caught(value: int, tmp_path: Path) -> None:
    changes = {**UNPACKED, "indices_as_float": True}
    says = damaged(tmp_path, "res_indices", value, (0, 5, 39), **changes)
    assert f"reaches {value}, but its codebook has 8 entries" in says


def test_an_outlier_code_out_of_range_is_caught(tmp_path: Path) -> None:
    says = damaged(tmp_path, "outlier_indices", 5, (0, 7, 3), **OUTLIERS)
    assert "reaches 5, but its codebook has 5 entries" in says


def test_bits_after_the_last_code_are_caught(tmp_path: Path) -> None:
    # 39 columns of 8 bits: a byte of padding a row
    changes = {"in_features": 39, "group_size": 39}
    state, _ = make_layer(case_of(**changes))
    state["indices"][0, 4, -1] ^= -(1 << 31)
    write_folder(tmp_path, [("m.q", {**PLAIN, **changes}, state)])
    with pytest.raises(TensorError, match="has bits set after the last code of a row"):
        open_source(tmp_path)["m.q"]


@pytest.mark.parametrize("value", [0, 40, -1])
def test_what_is_no_permutation_is_caught(value: int, tmp_path: Path) -> None:
    state, _ = make_layer(case_of())
    at = int((state["perm"] != 0).nonzero()[0])
    assert "names an input twice, or one outside 0..39" in damaged(tmp_path, "perm", value, (at,))


def test_a_permutation_that_16_bits_cannot_hold_is_caught(tmp_path: Path) -> None:
    wide = {"in_features": 65540, "group_size": 65540, "out_features": 2, "bias": False}
    case = case_of(**wide, enable_norm=False, num_res_centroids=[-1, -1])
    state, _ = make_layer(case)
    write_folder(tmp_path, [("m.q", case.config, state)])
    with pytest.raises(TensorError, match=r"'m\.q\.perm' names an input twice"):
        open_source(tmp_path)["m.q"]
    state["perm"] = torch.randperm(65540)
    write_folder(tmp_path, [("m.q", case.config, state)])
    tensor = open_source(tmp_path)["m.q"]
    assert torch.equal(tensor.parts["permutation"].long(), state["perm"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "key", ["centroids.weight", "res_centroids.weight", "weight_scale", "weight_bias", "bias"]
)
def test_numbers_that_are_none_are_caught(key: str, value: float, tmp_path: Path) -> None:
    at = (0, 5) if "centroids" in key else (5,)
    assert "holds NaN or infinity" in damaged(tmp_path, key, value, at)
