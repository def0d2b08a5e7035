"""AQLM checkpoints against the aqlm wheel, bit for bit, and each way that one is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.vqkernels.formats.aqlm_layers import (
    Case,
    draw_case,
    make_layer,
    same_bits,
    upstream,
    write_folder,
)
from vqkernels.errors import TensorError, UnsupportedError, VqError
from vqkernels.formats.aqlm import AqlmSource, dequantize
from vqkernels.formats.checkpoint import Checkpoint
from vqkernels.presets import parse_format
from vqkernels.tensor import random_tensor

NAME = "model.layers.0.mlp.down_proj"
SMALL = Case(rows=6, columns=5, codebooks=2, bits=4, width=2, length=4, bias=True)


def hold_to_the_wheel(folder: Path, case: Case) -> None:
    layer, weight = make_layer(case)
    source = write_folder(folder, case.config, {NAME: layer.state_dict()})
    tensor = source[NAME]
    tensor.validate()
    assert {name: tuple(part.shape) for name, part in tensor.parts.items()} == {
        name: part.shape for name, part in source.outline(NAME).table().items()
    }
    codes = upstream().unpack(layer.codes, case.bits)
    assert torch.equal(tensor.parts["codes"].long(), codes)
    assert same_bits(dequantize(tensor), weight)
    # and what kernels are held to: the same sums, not rounded
    exact = upstream().dequantize(codes, layer.codebooks.double(), layer.scales.double())
    torch.testing.assert_close(tensor.decode(), exact, rtol=1e-12, atol=0)
    if case.bias:
        assert torch.equal(tensor.parts["bias"], layer.bias.float())


@pytest.mark.parametrize("seed", range(24))
def test_a_layer_is_the_wheels_bit_for_bit(seed: int, tmp_path: Path) -> None:
    hold_to_the_wheel(tmp_path, draw_case(seed))


@pytest.mark.sweep
def test_many_layers_are_the_wheels_bit_for_bit(tmp_path: Path) -> None:
    for seed in range(100, 500):
        hold_to_the_wheel(tmp_path, draw_case(seed))


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_every_width_reach_both_ends(bits: int, tmp_path: Path) -> None:
    case = Case(rows=2, columns=4, codebooks=1, bits=bits, length=2)
    layer, weight = make_layer(case)
    half = 1 << (bits - 1)
    assert int(layer.codes.min()) >= -half and int(layer.codes.max()) < half
    tensor = write_folder(tmp_path, case.config, {NAME: layer.state_dict()})[NAME]
    codes = tensor.parts["codes"].int()
    assert (int(codes.min()), int(codes.max())) == (0, (1 << bits) - 1)
    assert tensor.parts["codes"].dtype == (torch.uint8 if bits <= 8 else torch.uint16)
    assert same_bits(dequantize(tensor), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_roundings_that_only_some_values_show(dtype: torch.dtype, tmp_path: Path) -> None:
    # halves between two numbers, of both signs; sums of zeros; a sum that overflows
    step, top = torch.finfo(dtype).eps, torch.finfo(dtype).max
    first = torch.tensor([1.0, -1.0, 1 + step, -1 - step, -0.0, 0.0, top, -top])
    second = torch.tensor([step / 2, -step / 2, step / 2, -step / 2, -0.0, -0.0, top, -top])
    case = Case(rows=1, columns=1, codebooks=2, bits=1, dtype=dtype)
    books = torch.stack([first, second])[:, None, None].expand(2, 2, 1, 8).to(dtype)
    state = {
        "codes": torch.zeros(1, 1, 2, dtype=torch.int8),
        "codebooks": books.contiguous(),
        "scales": torch.ones(1, 1, 1, 1, dtype=dtype),
    }
    weight = upstream().dequantize(state["codes"].long(), state["codebooks"], state["scales"])
    ours = dequantize(write_folder(tmp_path, case.config, {NAME: state})[NAME])
    assert same_bits(ours, weight)
    assert bool(torch.isinf(ours[0, -2:]).all())
    assert not bool(torch.signbit(ours[0, 4]))
    if dtype == torch.bfloat16:
        assert ours[0, 0] == 1 + step  # half to even would give 1


def test_large_matrices_are_dequantised_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, weight = make_layer(SMALL)
    tensor = write_folder(tmp_path, SMALL.config, {NAME: layer.state_dict()})[NAME]
    monkeypatch.setattr("vqkernels.formats.aqlm.read._PIECE", 4 * tensor.k + 1)
    assert same_bits(dequantize(tensor), weight)


def test_the_wheels_forward_multiplies_by_the_same_weight(tmp_path: Path) -> None:
    # with 16 entries it decodes and calls the BLAS
    case = dataclasses.replace(SMALL, dtype=torch.float32)
    layer, _ = make_layer(case)
    tensor = write_folder(tmp_path, case.config, {NAME: layer.state_dict()})[NAME]
    x = torch.randn(3, tensor.k, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(x, dequantize(tensor), tensor.bias)
    assert torch.equal(layer(x), expected)


def test_names_and_dense_tensors(tmp_path: Path) -> None:
    state = make_layer(SMALL)[0].state_dict()
    names = ["model.b.q", "model.a.q", "q"]
    dense = {
        "lm_head.weight": torch.zeros(3, 3),
        "model.norm.weight": torch.zeros(3),
        "model.scales": torch.zeros(1),
        "codes": torch.zeros(1),
    }
    source = write_folder(tmp_path, SMALL.config, dict.fromkeys(names, state), dense)
    assert sorted(source) == sorted(names)
    assert len(source) == 3
    assert source.dense_keys() == sorted(dense)
    assert source.outline("q").bias
    with pytest.raises(KeyError):
        source["model.norm"]
    with pytest.raises(KeyError):
        source.outline("model.norm")


def test_layers_may_differ_in_dtype_and_bias(tmp_path: Path) -> None:
    other = dataclasses.replace(SMALL, dtype=torch.bfloat16, bias=False)
    states = {"a": make_layer(SMALL)[0].state_dict(), "b": make_layer(other)[0].state_dict()}
    source = write_folder(tmp_path, SMALL.config, states)
    assert [source.outline(name).spec.codebook_dtype for name in "ab"] == ["float16", "bfloat16"]
    assert [source.outline(name).bias for name in "ab"] == [True, False]


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    case = Case(rows=2, columns=3, codebooks=1, bits=16)
    source = write_folder(
        tmp_path, {"quant_method": "AQLM"}, {NAME: make_layer(case)[0].state_dict()}
    )
    spec = source.outline(NAME).spec
    assert (spec.stages, spec.vector_length, spec.vector_width) == ((65536,), 8, 1)


def test_an_outline_reads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(checkpoint: Checkpoint, key: str) -> Tensor:
        raise AssertionError(f"read {key}")

    monkeypatch.setattr(Checkpoint, "read", read)
    source = write_folder(tmp_path, SMALL.config, {NAME: make_layer(SMALL)[0].state_dict()})
    outline = source.outline(NAME)
    assert (outline.n, outline.k, outline.bias) == (12, 20, True)
    assert outline.spec.to_dict() == {
        **parse_format("aqlm-2x4-g2x4").to_dict(),
        "codebook_dtype": "float16",
    }


def test_no_aqlm_layer_is_not_dequantised_as_one() -> None:
    tensor = random_tensor(parse_format("rq-2x16x8"), 64, 64)
    with pytest.raises(UnsupportedError, match="scale_axis is 'none', but an AQLM layer has 'row'"):
        dequantize(tensor)


# ------------------------------------------------------------------------------------------------
# refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(
        tmp_path,
        SMALL.config,
        {NAME: make_layer(SMALL)[0].state_dict()},
        {"lm_head.weight": torch.zeros(2, 2)},
    )
    return tmp_path


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= fields
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, **changed: Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for suffix, value in changed.items():
        if value is None:
            del tensors[f"{NAME}.{suffix}"]
        else:
            tensors[f"{NAME}.{suffix}"] = value.contiguous()
    save_file(tensors, path)


def refusal(folder: Path) -> str:
    with pytest.raises(VqError) as caught:
        AqlmSource(Checkpoint(folder))[NAME]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert message.startswith(str(folder))
    return message.removeprefix(str(folder))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "gptq"}, "/config.json: quant_method is 'gptq'"),
    "more bits": ({"nbits_per_codebook": 5}, r"codebooks' is float16 \[2, 16, 2, 4\].*\[2, 32"),
    "bits of int16": ({"nbits_per_codebook": 9}, r"codes' is int8.*should be int16"),
    "bits beyond": ({"nbits_per_codebook": 17}, "nbits_per_codebook .* 1 to 16, not 17"),
    "no bits": ({"nbits_per_codebook": 0}, "nbits_per_codebook .* from 1 to 16, not 0"),
    "bits as text": ({"nbits_per_codebook": "8"}, "not '8'; correct the config"),
    "bits null": ({"nbits_per_codebook": None}, "nbits_per_codebook .* not None"),
    "true": ({"num_codebooks": True}, "num_codebooks .* not True"),
    "a fraction": ({"num_codebooks": 2.0}, "num_codebooks .* not 2.0"),
    "another count": ({"num_codebooks": 3}, r"codes' is int8 \[6, 5, 2\].*\[6, 5, 3\]"),
    "a huge count": ({"num_codebooks": 10**15}, "num_codebooks .* 1 to 1024, not 10000"),
    "a huge group": ({"in_group_size": 10**400}, r"in_group_size .* not 1000\d{36}\.\.\.;"),
    "another length": ({"in_group_size": 8}, r"codebooks' .*should be float16 \[2, 16, 2, 8\]"),
    "groups exchanged": ({"in_group_size": 2, "out_group_size": 4}, r"codebooks' .* \[2, 16, 4, 2"),
    "kept as a weight": ({"linear_weights_not_to_quantize": [f"{NAME}.weight"]}, "which has codes"),
    "kept as a module": ({"linear_weights_not_to_quantize": [NAME]}, "which has codes; correct"),
    "kept no list": ({"linear_weights_not_to_quantize": NAME}, "is no list of names"),
    "kept numbers": ({"linear_weights_not_to_quantize": [1]}, "is no list of names"),
}


@pytest.mark.parametrize(("fields", "says"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_contradicts(fields: dict[str, Any], says: str, folder: Path) -> None:
    edit_config(folder, **fields)
    message = refusal(folder)
    assert pytest.RaisesExc(Exception, match=says).matches(Exception(message)), message


def nan() -> Tensor:
    return torch.full((6, 1, 1, 1), float("nan"), dtype=torch.float16)


TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no codes": ({"codes": None}, f"tensor '{NAME}.codes' is missing"),
    "no codebooks": ({"codebooks": None}, f"tensor '{NAME}.codebooks' is missing"),
    "no scales": ({"scales": None}, f"tensor '{NAME}.scales' is missing"),
    "nothing": ({"codes": None, "codebooks": None}, "holds no codes, so no AQLM layer"),
    "flat codes": ({"codes": torch.zeros(60, dtype=torch.int8)}, r"int8 \[60\], but should be \["),
    "empty codes": ({"codes": torch.zeros(0, 5, 2, dtype=torch.int8)}, "should be .rows, columns"),
    "unsigned codes": ({"codes": torch.zeros(6, 5, 2, dtype=torch.uint8)}, "codes' is uint8"),
    "wide codes": ({"codes": torch.zeros(6, 5, 2, dtype=torch.int32)}, "should be int8"),
    "fewer rows": ({"codes": torch.zeros(5, 5, 2, dtype=torch.int8)}, r"scales' .*\[5, 1, 1, 1\]"),
    "flat scales": ({"scales": torch.zeros(6, dtype=torch.float16)}, r"scales' is float16 \[6\]"),
    "other scales": ({"scales": torch.zeros(6, 1, 1, 1)}, "scales' is float32.*should be float16"),
    "short bias": ({"bias": torch.zeros(6, dtype=torch.float16)}, r"bias' .*float16 \[12\]"),
    "doubles": ({"codebooks": torch.zeros(2, 16, 2, 4).double()}, "should be float16, bfloat16"),
    "a weight too": ({"weight": torch.zeros(12, 20)}, "weight' lies in module .* remove it"),
    "a stranger": ({"zeros": torch.zeros(1)}, "zeros' lies in module .* is quantised; remove it"),
    "NaN in scales": ({"scales": nan()}, "scales' holds NaN or infinity; copy or download"),
    "infinity in bias": (
        {"bias": torch.full((12,), float("inf"), dtype=torch.float16)},
        "bias' holds NaN or infinity",
    ),
    "NaN in codebooks": ({"codebooks": nan()[:2].expand(2, 16, 2, 4)}, "codebooks' holds NaN"),
    "a code too high": (
        {"codes": torch.full((6, 5, 2), 8, dtype=torch.int8)},
        r"codes' holds code 8, outside of -8\.\.7",
    ),
    "a code too low": (
        {"codes": torch.full((6, 5, 2), -9, dtype=torch.int8)},
        r"codes' holds code -9, outside of -8\.\.7",
    ),
}


@pytest.mark.parametrize(("changed", "says"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_a_layers(
    changed: dict[str, Tensor | None], says: str, folder: Path
) -> None:
    edit_tensors(folder, **changed)
    message = refusal(folder)
    assert pytest.RaisesExc(Exception, match=says).matches(Exception(message)), message


def test_codes_out_of_range_are_what_the_wheels_paths_disagree_about() -> None:
    # why they are refused: this one reduces them, its Triton kernel adds 2^bits to negative ones
    codes = torch.tensor([20, -20], dtype=torch.int16)
    assert upstream().unpack(codes, 4).tolist() == [4, 12]


def test_a_checkpoint_saved_after_a_forward_pass_on_a_cpu_is_refused(tmp_path: Path) -> None:
    case = Case(rows=3, columns=2, bits=8)
    layer, _ = make_layer(case)
    layer.prepare_matmul_op(torch.zeros(1, 16))  # what the first forward pass calls
    assert tuple(layer.codes.shape) == (2, 3, 2)
    with pytest.raises(VqError, match=r"codes' has rows and columns exchanged.*forward pass"):
        write_folder(tmp_path, case.config, {NAME: layer.state_dict()})


def test_a_later_layer_is_checked_when_the_folder_is_opened(tmp_path: Path) -> None:
    good, bad = (make_layer(SMALL)[0].state_dict() for _ in range(2))
    bad["codes"] = bad["codes"][:, :, :1]
    with pytest.raises(VqError, match=r"tensor 'b\.codes'"):
        write_folder(tmp_path, SMALL.config, {"a": good, "b": bad})


def test_a_tensor_is_checked_when_it_is_read(folder: Path) -> None:
    edit_tensors(folder, scales=nan())
    source = AqlmSource(Checkpoint(folder))
    with pytest.raises(TensorError, match="scales' holds NaN"):
        source[NAME]
