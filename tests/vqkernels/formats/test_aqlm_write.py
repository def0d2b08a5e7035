"""AQLM checkpoints written: what is read back, and what can't be written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vqkernels.formats.aqlm_layers import (
    Case,
    draw_case,
    make_layer,
    same_bits,
    upstream,
    write_folder,
)
from vqkernels.errors import ContainerError, SpecError, TensorError, UnsupportedError
from vqkernels.formats.aqlm import AqlmSource, dequantize, export
from vqkernels.formats.checkpoint import Checkpoint
from vqkernels.presets import parse_format
from vqkernels.quantize import quantize
from vqkernels.source import Outline, TensorSource
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

WIDE = parse_format("aqlm-2x4-g2x4")
DENSE = {"lm_head.weight": torch.randn(3, 4), "norm.weight": torch.randn(4).bfloat16()}


def opened(folder: Path) -> AqlmSource:
    return AqlmSource(Checkpoint(folder))


def wide(seed: int = 0, *, bias: bool = False, **fields: Any) -> QuantizedTensor:
    """A random matrix in `WIDE`, with one scale for two rows."""
    spec = dataclasses.replace(WIDE, **fields)
    tensor = random_tensor(spec, 12, 40, seed=seed, bias=bias)
    scale = tensor.parts["scale"]
    parts = {"scale": scale[::2].repeat_interleave(2)}
    if bias:
        parts["bias"] = tensor.parts["bias"].to(scale.dtype).float()
    return tensor.replace_parts(**parts)


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    return list(one.parts) == list(other.parts) and all(
        same_bits(part, other.parts[name]) for name, part in one.parts.items()
    )


def there_and_back(tmp_path: Path, case: Case) -> None:
    """A checkpoint of the wheel's, read, written, and read again."""
    layer, weight = make_layer(case)
    first = tmp_path / f"{case.seed}-first"
    source = write_folder(first, case.config, {"m.q": layer.state_dict()}, DENSE)
    dense = source.checkpoint.tensors(source.dense_keys())
    second = tmp_path / f"{case.seed}-second"
    export(second, source, config=source.checkpoint.config, dense=dense)
    one, other = Checkpoint(first), Checkpoint(second)
    assert one.keys() == other.keys()
    assert all(same_bits(one.read(key), other.read(key)) for key in one.keys())  # noqa: SIM118
    again = opened(second)
    assert same(again["m.q"], source["m.q"])
    assert again["m.q"].spec == source["m.q"].spec
    assert same_bits(dequantize(again["m.q"]), weight)


@pytest.mark.parametrize("seed", range(8))
def test_what_the_wheel_wrote_is_written_again(seed: int, tmp_path: Path) -> None:
    there_and_back(tmp_path, draw_case(seed))


@pytest.mark.sweep
def test_much_that_the_wheel_wrote_is_written_again(tmp_path: Path) -> None:
    for seed in range(1000, 1100):
        there_and_back(tmp_path, draw_case(seed))


@pytest.mark.parametrize("bits", range(1, 17))
def test_ours_are_read_back_and_are_the_wheels_too(bits: int, tmp_path: Path) -> None:
    spec = parse_format(f"aqlm-3x{bits}-g1x4")
    tensor = random_tensor(spec, 6, 20, bias=True, fit=False)
    tensor = tensor.replace_parts(bias=tensor.parts["bias"].half().float())
    codes = tensor.parts["codes"].int()
    codes[0, 0], codes[1, 1] = 0, (1 << bits) - 1
    tensor = tensor.replace_parts(codes=codes.to(tensor.parts["codes"].dtype))
    export(tmp_path / "out", {"q": tensor})
    back = opened(tmp_path / "out")["q"]
    assert same(back, tensor)
    assert back.spec == spec
    read = Checkpoint(tmp_path / "out").read
    theirs = upstream().unpack(read("q.codes"), bits)
    weight = upstream().dequantize(theirs, read("q.codebooks"), read("q.scales"))
    assert same_bits(dequantize(tensor), weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_wide_vectors_are_read_back(dtype: str, tmp_path: Path) -> None:
    tensors = {f"m.{seed}": wide(seed, codebook_dtype=dtype, side_dtype=dtype) for seed in range(3)}
    tensors["m.b"] = wide(9, bias=True, codebook_dtype=dtype, side_dtype=dtype)
    export(tmp_path / "out", tensors, shard_bytes=2000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    source = opened(tmp_path / "out")
    assert sorted(source) == sorted(tensors)
    assert all(same(source[name], tensor) for name, tensor in tensors.items())


def test_a_single_vector_is_read_back(tmp_path: Path) -> None:
    # of tensors of one number torch keeps any strides
    tensor = random_tensor(WIDE, 2, 4, fit=False)
    tensor = tensor.replace_parts(scale=tensor.parts["scale"][[0, 0]])
    export(tmp_path / "out", {"q": tensor})
    assert same(opened(tmp_path / "out")["q"], tensor)


def test_how_codes_were_found_is_all_that_is_lost(tmp_path: Path) -> None:
    spec = dataclasses.replace(
        parse_format("rq-2x16x4"), scale_axis="row", traversal="column", code_bits=(8, 8)
    )
    tensor = quantize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), spec)
    export(tmp_path / "out", {"q": tensor})
    back = opened(tmp_path / "out")["q"]
    assert same(back, tensor)
    assert torch.equal(back.decode(), tensor.decode())
    assert back.spec == dataclasses.replace(
        spec, method="additive", traversal="row", code_bits=(4, 4)
    )


def test_the_config_names_what_is_dense(tmp_path: Path) -> None:
    dense = {**DENSE, "m.weight": torch.zeros(2, 2), "conv.weight": torch.zeros(2, 2, 2)}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "vptq"}}
    export(tmp_path / "out", {"m.q": wide()}, config=config, dense=dense)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content == {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "aqlm",
            "num_codebooks": 2,
            "nbits_per_codebook": 4,
            "out_group_size": 2,
            "in_group_size": 4,
            # not "m", with which the name of a quantised module begins
            "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight", "m.weight"],
        },
    }
    source = opened(tmp_path / "out")
    assert source.dense_keys() == sorted(dense)
    read = source.checkpoint.read
    assert all(same_bits(read(key), value) for key, value in dense.items())


class Counting(TensorSource):
    """Counts lookups; what is looked up is made anew, and nothing is kept."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.lookups = names, []

    def __getitem__(self, name: str) -> QuantizedTensor:
        self.lookups.append(name)
        return wide(self.names.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def outline(self, name: str) -> Outline:
        return Outline(spec=WIDE, n=12, k=40)


def test_each_matrix_is_looked_up_once(tmp_path: Path) -> None:
    source = Counting(["b", "a", "c"])
    export(tmp_path / "out", source)
    assert source.lookups == ["b", "a", "c"]
    assert same(opened(tmp_path / "out")["c"], wide(2))


# ------------------------------------------------------------------------------------------------
# refused


def changed(**fields: Any) -> CodebookSpec:
    return dataclasses.replace(parse_format("aqlm-2x4-g1x4"), **fields)


SPECS: dict[str, tuple[CodebookSpec, str]] = {
    "along out": (parse_format("toy-16-4"), "codebooks of 16, 4 entries"),
    "vectors along out": (changed(vector_axis="out"), "vector_axis is 'out', but .* has 'in'"),
    "no power of two": (changed(stages=(12, 12), code_bits=()), "codebooks of 12, 12 entries"),
    "one entry": (changed(stages=(1,), code_bits=()), "codebooks of 1 entries"),
    "int8": (changed(codebook_dtype="int8"), "codebooks in int8, but AQLM's are floats"),
    "other side dtype": (changed(side_dtype="float32"), "side_dtype is 'float32', but .*'float16'"),
    "no scale": (changed(scale_axis="none"), "scale_axis is 'none', but an AQLM layer has 'row'"),
    "zeros": (changed(zero_axis="row"), "zero_axis is 'row'"),
    "groups": (changed(group_axis="row", group_size=6), "group_axis is 'row'"),
    "subspaces": (changed(subspaces=2), "subspaces is 2, but an AQLM layer has 1"),
    "coefficients": (changed(coefficients=(1.0, 0.5)), r"coefficients is \(1.0, 0.5\)"),
    "stride": (changed(stride=2), "stride is 2"),
    "permuted": (changed(permuted=True), "permuted is True"),
    "rotated": (changed(rotation_size=4), "rotation_size is 4"),
    "outliers": (changed(outlier_columns=4), "outlier_columns is 4"),
    "uniform": (changed(uniform_columns=4), "uniform_columns is 4"),
    "ragged k": (changed(vector_length=3), "vectors of 3 don't divide 12 x 40, and AQLM pads"),
    "ragged n": (changed(vector_width=5), "vectors of 5x4 don't divide 12 x 40"),
}


@pytest.mark.parametrize(("spec", "says"), SPECS.values(), ids=SPECS)
def test_a_format_that_aqlm_has_not(spec: CodebookSpec, says: str, tmp_path: Path) -> None:
    tensors = {"fine": wide(), "m.bad": random_tensor(spec, 12, 40, fit=False)}
    with pytest.raises(UnsupportedError, match=f"matrix 'm.bad': {says}.*; keep it in a container"):
        export(tmp_path / "out", tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("aqlm-2x4-g1x4", "matrix 'b': out_group_size is 1, but 2 in 'a'"),
        ("aqlm-3x4-g2x4", "matrix 'b': num_codebooks is 3, but 2 in 'a'"),
        ("aqlm-2x5-g2x4", "matrix 'b': nbits_per_codebook is 5, but 4 in 'a'"),
        ("aqlm-2x4-g2x8", "matrix 'b': in_group_size is 8, but 4 in 'a'"),
    ],
)
def test_matrices_of_two_schemes(other: str, says: str, tmp_path: Path) -> None:
    second = random_tensor(parse_format(other), 12, 40, fit=False)
    with pytest.raises(UnsupportedError, match=f"{says}, and an AQLM checkpoint has one"):
        export(tmp_path / "out", {"a": wide(), "b": second})
    assert list(tmp_path.iterdir()) == []


def negative_zero(tensor: QuantizedTensor) -> Tensor:
    scale = tensor.parts["scale"].clone()
    scale[4], scale[5] = 0.0, -0.0
    return scale


def nudged(tensor: QuantizedTensor) -> Tensor:
    scale = tensor.parts["scale"].clone()
    scale[5] = scale[5] * 2
    return scale


@pytest.mark.parametrize("change", [nudged, negative_zero])
def test_scales_that_differ_within_a_vector(change: Any, tmp_path: Path) -> None:
    tensor = wide().replace_parts(scale=change(wide()))
    with pytest.raises(UnsupportedError, match="matrix 'b': scales of rows 4 to 5 differ"):
        export(tmp_path / "out", {"a": wide(), "b": tensor})
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_is_not_exact(tmp_path: Path) -> None:
    tensor = wide(bias=True)
    tensor = tensor.replace_parts(bias=tensor.parts["bias"] + 2.0**-20)
    with pytest.raises(UnsupportedError, match="matrix 'b': its bias isn't exact in float16"):
        export(tmp_path / "out", {"b": tensor})
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_matrix(tmp_path: Path) -> None:
    tensor = wide()
    tensor = tensor.replace_parts(codes=tensor.parts["codes"] + 16)
    with pytest.raises(TensorError, match=r"matrix 'b': codes of stage 0 reach"):
        export(tmp_path / "out", {"a": wide(), "b": tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["m.q.bias", "m.q.weight", "x.codes", "x.codebooks"])
def test_a_dense_tensor_that_would_be_taken_for_a_layers(key: str, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=f"tensor '{key}' would be taken for"):
        export(tmp_path / "out", {"m.q": wide()}, dense={key: torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="out: no matrices to write; name one"):
        export(tmp_path / "out", {})


def test_a_scheme_that_could_not_be_read_back(tmp_path: Path) -> None:
    tensor = random_tensor(changed(vector_length=1 << 17), 2, 8, fit=False)
    with pytest.raises(SpecError, match="in_group_size must be a whole number from 1 to 65536"):
        export(tmp_path / "out", {"q": tensor})


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ContainerError, match="holds something already"):
        export(tmp_path, {"q": wide()})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
