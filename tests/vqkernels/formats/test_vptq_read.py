"""VPTQ checkpoints: equal to the wheel's dequant bit for bit, in every layout that it wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vqkernels.formats.vptq_layers import (
    OUTLIERS,
    PLAIN,
    UNPACKED,
    Case,
    case_of,
    draw_case,
    make_layer,
    refusal,
    upstream,
    write_folder,
)
from vqkernels.errors import ContainerError, UnsupportedError
from vqkernels.formats import Checkpoint, open_source
from vqkernels.formats.vptq import VptqSource, dequantize
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int16)


def check_against_upstream(folder: Path, case: Case) -> QuantizedTensor:
    state, weight = make_layer(case)
    write_folder(folder, [("m.q", case.config, state)])
    source = VptqSource(Checkpoint(folder))
    tensor = source["m.q"]
    mine = dequantize(tensor)
    assert mine.dtype == case.dtype
    assert torch.equal(bits(mine), bits(weight)), case
    if tensor.bias is not None:
        assert torch.equal(bits(tensor.bias.to(case.dtype)), bits(state["bias"]))
    outline = source.outline("m.q")
    assert (outline.spec, outline.n, outline.k) == (tensor.spec, tensor.n, tensor.k)
    assert outline.bias == (tensor.bias is not None)
    return tensor


# ------------------------------------------------------------------------------------------------
# against the wheel


@pytest.mark.parametrize("seed", range(16))
def test_random_layers_equal_the_wheel(seed: int, tmp_path: Path) -> None:
    check_against_upstream(tmp_path, draw_case(seed))


@pytest.mark.sweep
@pytest.mark.parametrize("start", range(1000, 2200, 100))
def test_many_random_layers_equal_the_wheel(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 100):
        check_against_upstream(tmp_path / str(seed), draw_case(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        UNPACKED,
        {**UNPACKED, "indices_as_float": True, **OUTLIERS},
        OUTLIERS,
        {"group_num": 2, "group_size": 20},
        OUTLIERS | {"group_num": 4, "group_size": 9},
        {"norm_dim": 1},
        {"norm_dim": 0, "enable_perm": False},
        {"num_res_centroids": [-1, -1], "enable_norm": False},
        {"group_num": 2, "group_size": 20, "num_centroids": [-1, 65536], **UNPACKED},
        # 32 bits a cell: the top bit of a word is a code's
        {"num_centroids": [-1, 65536], "num_res_centroids": [-1, 65536], "vector_lens": [-1, 2]},
        # residual codes wider than main ones, which only an unpacked layer keeps
        {**UNPACKED, "num_res_centroids": [-1, 256]},
        # other words for no outliers
        {"vector_lens": [1, 4], "num_centroids": [32, 32], "num_res_centroids": [0, 8]},
        {"num_centroids": [16, 32]},
    ],
)
def test_each_layout_equals_the_wheel(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    case = case_of(dtype, **changes)
    if dtype == torch.float32:
        state, weight = make_layer(case)
        write_folder(tmp_path, [("m.q", case.config, state)])
        mine = dequantize(open_source(tmp_path)["m.q"])
        assert torch.equal(mine.view(torch.int32), weight.contiguous().view(torch.int32))
    else:
        check_against_upstream(tmp_path, case)


def test_a_product_of_the_wheel_is_one_with_the_weight(tmp_path: Path) -> None:
    case = case_of(**OUTLIERS, bias=False)
    state, _ = make_layer(case)
    layer = upstream().layer(**case.config, dtype=case.dtype, enable_proxy_error=False)
    layer.load_state_dict(state)
    write_folder(tmp_path, [("m.q", case.config, state)])
    weight = dequantize(open_source(tmp_path)["m.q"])
    identity = torch.eye(case.config["in_features"], dtype=case.dtype)
    assert torch.equal(layer(identity), weight.T)


def test_the_spec_says_all_of_it(tmp_path: Path) -> None:
    case = case_of(torch.bfloat16, **{**OUTLIERS, "group_num": 2, "group_size": 18})
    tensor = check_against_upstream(tmp_path, case)
    assert (tensor.n, tensor.k) == (22, 40)
    assert tensor.spec == CodebookSpec(
        method="vptq",
        vector_axis="out",
        vector_length=4,
        stages=(32, 8),
        code_bits=(5, 3),
        group_axis="column",
        group_size=18,
        codebook_dtype="bfloat16",
        side_dtype="bfloat16",
        scale_axis="column",
        zero_axis="column",
        permuted=True,
        outlier_columns=4,
        outlier_entries=5,
        outlier_vector_length=3,
    )
    assert tensor.parts["codes"].shape == (6, 36, 2)
    assert tensor.parts["outlier_codes"].shape == (8, 4)


def test_large_layers_are_unpacked_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqkernels.formats.vptq.read._PIECE", 700)
    check_against_upstream(tmp_path, case_of(group_num=2, group_size=20))


def test_dequantize_takes_only_what_vptq_has() -> None:
    spec = CodebookSpec(vector_length=8, stages=(256, 256), method="additive")
    with pytest.raises(UnsupportedError, match="vector_axis is 'in', but a VPTQ layer"):
        dequantize(random_tensor(spec, 16, 64, fit=False))


# ------------------------------------------------------------------------------------------------
# what the wheel reads wrongly


def test_the_wheel_rounds_code_widths_down(tmp_path: Path) -> None:
    case = case_of(num_centroids=[-1, 12], num_res_centroids=[-1, -1])
    with pytest.raises(AssertionError):  # its own packing doesn't come back
        make_layer(case)
    assert "num_centroids names 12 entries" in refusal(tmp_path, num_centroids=[-1, 12])
    says = refusal(tmp_path, num_res_centroids=[-1, 6], **UNPACKED)
    assert "num_res_centroids names 6 entries" in says
    assert "only a power of two from 2 to 65536 can be read" in says


def test_the_wheel_reads_no_wide_residual_codes(tmp_path: Path) -> None:
    case = case_of(num_centroids=[-1, 8], num_res_centroids=[-1, 32])
    with pytest.raises(AssertionError):
        make_layer(case)
    says = refusal(tmp_path, num_centroids=[-1, 8], num_res_centroids=[-1, 32])
    assert "32 residual entries for 8 main ones, packed" in says


def test_the_wheel_takes_padding_for_codes_of_tiny_groups(tmp_path: Path) -> None:
    tiny = {"in_features": 2, "group_size": 2}
    state, weight = make_layer(case_of(**tiny, **UNPACKED))
    with pytest.raises((AssertionError, RuntimeError)):
        make_layer(case_of(**tiny))
    words = torch.zeros(1, 6, 1, dtype=torch.int64)
    for column in (0, 1):
        for key, first in (("indices", 0), ("res_indices", 5)):
            words[..., 0] |= state[key][..., column].long() << (8 * column + first)
    packed = {key: value for key, value in state.items() if key != "res_indices"}
    packed["indices"] = words.to(torch.int32)
    write_folder(tmp_path, [("m.q", {**PLAIN, **tiny}, packed)])
    assert torch.equal(bits(dequantize(open_source(tmp_path)["m.q"])), bits(weight))


def test_the_wheel_takes_the_bytes_of_an_unpacked_permutation_for_numbers(tmp_path: Path) -> None:
    config = {**PLAIN, **UNPACKED, "num_res_centroids": [-1, -1]}
    state, _ = make_layer(Case(config, torch.float16))
    assert state["perm"].dtype == torch.int64
    layer = upstream().layer(**config, dtype=torch.float16, enable_proxy_error=False)
    layer.load_state_dict(state)
    with pytest.raises((IndexError, RuntimeError)):
        layer(torch.eye(40, dtype=torch.float16))
    check_against_upstream(tmp_path, Case(config, torch.float16))


def test_the_wheel_makes_no_unpacked_layer_with_residuals() -> None:
    with pytest.raises(AttributeError):
        upstream().layer(**{**PLAIN, **UNPACKED})


def test_the_wheel_drops_outliers_in_vectors_of_one(tmp_path: Path) -> None:
    changes = {**OUTLIERS, "vector_lens": [1, 4]}
    layer = upstream().layer(**{**PLAIN, **changes})
    assert not layer.enable_outlier
    assert "the upstream drops outliers" in refusal(tmp_path, **changes)


# ------------------------------------------------------------------------------------------------
# folders: several layers, shared configs, what is left dense


def several(folder: Path, **quantization: Any) -> VptqSource:
    case = case_of()
    state, _ = make_layer(case)
    named = [("model.layers.0.self_attn.q_proj", case.config, state)]
    dense = {
        "model.embed.weight": torch.ones(3, 2),
        "model.layers.0.norm.weight": torch.ones(4),
        "lm_head.weight": torch.ones(3, 2),
    }
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"):
        dense |= {f"{name}.{key}": value.clone() for key, value in state.items()}
    quantization = {"shared_layer_config": {"down_proj": case.config}, **quantization}
    write_folder(folder, named, dense=dense, **quantization)
    return VptqSource(Checkpoint(folder))


def test_a_shared_config_is_that_of_every_module_of_the_name(tmp_path: Path) -> None:
    source = several(tmp_path)
    assert list(source) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert len(source) == 3
    assert "model.layers.1.mlp.down_proj" in source
    assert "lm_head" not in source
    first, *others = [dequantize(source[name]) for name in source]
    assert all(torch.equal(first, other) for other in others)
    assert source.dense_keys() == [
        "lm_head.weight",
        "model.embed.weight",
        "model.layers.0.norm.weight",
    ]
    for look in (source.__getitem__, source.outline):
        with pytest.raises(KeyError):
            look("lm_head")


@pytest.mark.parametrize(
    "kept", ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.1", "mlp.down_proj"]
)
def test_modules_that_are_not_converted_are_dense(kept: str, tmp_path: Path) -> None:
    if kept == "lm_head":
        assert "lm_head.weight" in several(tmp_path, modules_to_not_convert=[kept]).dense_keys()
        return
    with pytest.raises(ContainerError, match="holds VPTQ tensors, but has no entry in") as caught:
        several(tmp_path, modules_to_not_convert=[kept])
    assert str(caught.value).startswith(f"{tmp_path}/config.json: module 'model.layers.")


def test_a_module_that_is_not_converted_needs_no_config_of_its_own(tmp_path: Path) -> None:
    state, _ = make_layer(case_of())
    dense = {"lm_head.weight": torch.ones(3, 2)}
    named = [("m.q", PLAIN, state), ("lm_head", PLAIN, {})]
    write_folder(tmp_path, named, dense=dense, modules_to_not_convert=["lm_head"])
    source = VptqSource(Checkpoint(tmp_path))
    assert list(source) == ["m.q"]
    assert source.dense_keys() == ["lm_head.weight"]


def test_a_dense_module_of_a_shared_name_has_to_be_named(tmp_path: Path) -> None:
    shared = {"down_proj": PLAIN, "lm_head": PLAIN}
    with pytest.raises(ContainerError, match=r"add 'lm_head' to modules_to_not_convert"):
        several(tmp_path, shared_layer_config=shared)
    source = several(tmp_path, shared_layer_config=shared, modules_to_not_convert=["lm_head"])
    assert len(source) == 3


@pytest.mark.parametrize("bias", [True, None])
@pytest.mark.parametrize("present", [True, False])
def test_a_bias_may_be_left_to_the_model(bias: bool | None, present: bool, tmp_path: Path) -> None:
    state, _ = make_layer(case_of(bias=present))
    write_folder(tmp_path, [("m.q", {**PLAIN, "bias": bias}, state)])
    if bias and not present:
        with pytest.raises(ContainerError, match=r"tensor 'm\.q\.bias' is missing"):
            open_source(tmp_path)
    else:
        assert open_source(tmp_path).outline("m.q").bias == present


def test_a_group_size_may_be_left_out(tmp_path: Path) -> None:
    state, _ = make_layer(case_of())
    write_folder(tmp_path, [("m.q", {**PLAIN, "group_size": -1}, state)])
    assert open_source(tmp_path).outline("m.q").spec.group_axis == "tensor"


def test_looking_up_keeps_nothing(tmp_path: Path) -> None:
    source = several(tmp_path)
    name = next(iter(source))
    source[name].parts["codes"].zero_()
    assert bool((source[name].parts["codes"] != 0).any())


def test_float_codes_are_bits_not_numbers(tmp_path: Path) -> None:
    # 0x7E01 as float16 is NaN, and a code like any other
    config = {**PLAIN, **UNPACKED, "indices_as_float": True, "num_centroids": [-1, 65536]}
    case = Case(config, torch.float16)
    state, _ = make_layer(case)
    state["indices"] = state["indices"].view(torch.int16).fill_(0x7E01).view(torch.float16)
    write_folder(tmp_path, [("m.q", config, state)])
    codes = open_source(tmp_path)["m.q"].parts["codes"].to(torch.int32)
    assert bool((codes[..., 0] == 0x7E01).all())


def test_equal_cases_make_equal_layers() -> None:
    # the oracle's inputs are the same on every run
    case = dataclasses.replace(draw_case(3))
    first, second = make_layer(case)[0], make_layer(case)[0]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_top_bit_of_a_permutation_is_no_sign(tmp_path: Path) -> None:
    wide = {"in_features": 40_000, "group_size": 40_000, "out_features": 2, "bias": False}
    check_against_upstream(tmp_path, case_of(**wide))
