"""VPTQ export: what comes back is what went in, the wheel loads it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.vqkernels.formats.vptq_layers import draw_case, make_layer, upstream, write_folder
from vqkernels.errors import ContainerError, TensorError, UnsupportedError
from vqkernels.formats import open_source
from vqkernels.formats.vptq import VptqSource, dequantize, export
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(
    method="vptq",
    vector_axis="out",
    vector_length=4,
    stages=(16, 8),
    group_axis="column",
    group_size=18,
    codebook_dtype="bfloat16",
    side_dtype="bfloat16",
    scale_axis="column",
    zero_axis="column",
    permuted=True,
    outlier_columns=4,
    outlier_entries=300,
    outlier_vector_length=3,
)


def tensor_of(n: int = 22, k: int = 40, *, bias: bool = True, **changes: Any) -> QuantizedTensor:
    spec = CodebookSpec.from_dict({**SPEC.to_dict(), "code_bits": [], **changes})
    tensor = random_tensor(spec, n, k, bias=bias, fit=False)
    if not bias:
        return tensor
    rounded = tensor.parts["bias"].to(getattr(torch, spec.codebook_dtype)).to(torch.float32)
    return tensor.replace_parts(bias=rounded)


def assert_same(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert (first.spec, first.n, first.k) == (second.spec, second.n, second.k)
    assert set(first.parts) == set(second.parts)
    for name, part in first.parts.items():
        assert part.dtype == second.parts[name].dtype, name
        assert torch.equal(part, second.parts[name]), name


@st.composite
def layers(draw: st.DrawFn) -> QuantizedTensor:
    """A matrix that VPTQ can hold."""
    main = draw(st.integers(1, 7))
    bits = [main, draw(st.integers(1, main))][: draw(st.integers(1, 2))]
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    axis = draw(st.sampled_from(["none", "row", "column"]))
    outliers = draw(st.integers(0, 3))
    changes = {
        "vector_length": draw(st.integers(1, 9)),
        "stages": [1 << count for count in bits],
        "group_axis": "column" if groups > 1 else "tensor",
        "group_size": size if groups > 1 else 0,
        "codebook_dtype": dtype,
        "side_dtype": dtype,
        "scale_axis": axis,
        "zero_axis": axis,
        "permuted": draw(st.booleans()),
        "outlier_columns": outliers,
        "outlier_entries": draw(st.sampled_from([1, 9, 256, 257])) if outliers else 0,
        "outlier_vector_length": draw(st.integers(2, 6)) if outliers else 0,
    }
    n, k = draw(st.integers(1, 30)), groups * size + outliers
    return tensor_of(n, k, bias=draw(st.booleans()), **changes)


# ------------------------------------------------------------------------------------------------
# there and back


@settings(max_examples=40)
@given(tensor=layers())
def test_what_is_written_comes_back(tensor: QuantizedTensor, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("out") / "folder"
    export(folder, {"model.a": tensor})
    source = open_source(folder)
    assert list(source) == ["model.a"]
    assert_same(source["model.a"], tensor)


@pytest.mark.parametrize("seed", range(200, 206))
def test_the_wheels_packed_tensors_keep_their_bytes(seed: int, tmp_path: Path) -> None:
    check_round_trip(seed, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("start", range(3000, 3400, 100))
def test_many_packed_tensors_keep_their_bytes(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 100):
        check_round_trip(seed, tmp_path / str(seed))


def check_round_trip(seed: int, folder: Path) -> None:
    case = draw_case(seed)
    config = {**case.config, "is_indice_packed": True, "indices_as_float": False}
    case = dataclasses.replace(case, config=config)
    state, weight = make_layer(case)
    folder.mkdir(exist_ok=True)
    write_folder(folder / "theirs", [("m.q", config, state)])
    export(folder / "ours", open_source(folder / "theirs"))
    theirs = load_file(folder / "theirs" / "model.safetensors")
    ours = load_file(folder / "ours" / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(ours[key].view(torch.uint8), value.view(torch.uint8)), key
    written = json.loads((folder / "ours" / "config.json").read_text())["quantization_config"]
    assert written["config_for_layers"]["m.q"] == {
        name: value for name, value in config.items() if (name, value) != ("norm_dim", 0)
    }
    assert torch.equal(dequantize(open_source(folder / "ours")["m.q"]), weight)


def test_the_wheel_loads_what_is_written(tmp_path: Path) -> None:
    tensor = tensor_of(bias=False)
    export(tmp_path / "out", {"m.q": tensor})
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "vptq"
    layer = upstream().layer(
        **config["config_for_layers"]["m.q"], dtype=torch.bfloat16, enable_proxy_error=False
    )
    tensors = load_file(tmp_path / "out/model.safetensors")
    layer.load_state_dict({key.removeprefix("m.q."): value for key, value in tensors.items()})
    identity = torch.eye(tensor.k, dtype=torch.bfloat16)
    assert torch.equal(layer(identity).T, dequantize(tensor))


def test_unpacked_layers_are_packed(tmp_path: Path) -> None:
    config = {
        **draw_case(0).config,
        "is_indice_packed": False,
        "enable_perm": True,
        "bias": True,
    }
    state, weight = make_layer(dataclasses.replace(draw_case(0), config=config))
    write_folder(tmp_path / "theirs", [("m.q", config, state)])
    source = open_source(tmp_path / "theirs")
    export(tmp_path / "ours", source)
    again = open_source(tmp_path / "ours")
    assert_same(again["m.q"], source["m.q"])
    assert torch.equal(dequantize(again["m.q"]), weight)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    assert (tensors["m.q.indices"].dtype, tensors["m.q.perm"].dtype) == (torch.int32, torch.int16)


def test_large_codes_are_packed_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = tensor_of()
    export(tmp_path / "whole", {"a": tensor})
    monkeypatch.setattr("vqkernels.formats.vptq.write._PIECE", 300)
    export(tmp_path / "pieces", {"a": tensor})
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "pieces")]
    assert files[0].read_bytes() == files[1].read_bytes()


# ------------------------------------------------------------------------------------------------
# the rest of a model


DENSE = {
    "lm_head.weight": torch.randn(5, 6),
    "model.norm.weight": torch.randn(6).to(torch.bfloat16),
    "model.layers.0.mlp.gate.weight": torch.arange(4).reshape(2, 2),
    "model.rope": torch.tensor(3.0),
}


def test_dense_tensors_and_the_models_config_are_kept(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "aqlm"},
        "text_config": {"hidden": 4, "quantization_config": {}},
    }
    tensors = {
        "model.layers.0.mlp.up": tensor_of(),
        "model.layers.0.mlp.down": tensor_of(bias=False),
    }
    export(tmp_path / "out", tensors, config=config, dense=DENSE)
    source = open_source(tmp_path / "out")
    assert isinstance(source, VptqSource)
    assert list(source) == list(tensors)
    assert source.dense_keys() == sorted(DENSE)
    copies = source.checkpoint.tensors(source.dense_keys())
    assert len(copies) == len(DENSE)
    for key, value in DENSE.items():
        assert torch.equal(copies[key], value)
        assert copies[key].dtype == value.dtype
    with pytest.raises(KeyError):
        copies["model.layers.0.mlp.up.indices"]
    written = source.checkpoint.config
    assert written["model_type"] == "llama"
    assert written["text_config"] == {"hidden": 4}
    # transformers quantises every linear layer that isn't named
    assert written["quantization_config"]["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.mlp.gate",
    ]
    # and an export of that is the same again
    export(tmp_path / "again", source, config=written, dense=copies)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_kept_name_never_hides_a_quantised_one(tmp_path: Path) -> None:
    dense = {"proj.weight": torch.randn(2, 2)}
    export(tmp_path / "out", {"m.proj": tensor_of()}, dense=dense)
    assert list(open_source(tmp_path / "out")) == ["m.proj"]


def test_shards_hold_whole_layers(tmp_path: Path) -> None:
    source = {f"m.{number}": tensor_of() for number in range(5)}
    export(tmp_path / "out", source, dense={"e": torch.ones(3)}, shard_bytes=12_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert 2 <= count <= 4
    assert shards == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    stored = {name: load_file(tmp_path / "out" / name) for name in shards}
    assert index["weight_map"] == dict(
        sorted((key, name) for name, tensors in stored.items() for key in tensors)
    )
    total = sum(v.nbytes for tensors in stored.values() for v in tensors.values())
    assert index["metadata"] == {"total_size": total}
    for name in source:
        places = {shard for key, shard in index["weight_map"].items() if key.startswith(f"{name}.")}
        assert len(places) == 1
    again = open_source(tmp_path / "out")
    for name, tensor in source.items():
        assert_same(again[name], tensor)


def test_a_source_is_read_a_matrix_at_a_time(tmp_path: Path) -> None:
    export(tmp_path / "theirs", {name: tensor_of() for name in "abc"})
    source = open_source(tmp_path / "theirs")
    alive, most = 0, 0
    read = type(source).__getitem__

    class Watched(VptqSource):
        def __getitem__(self, name: str) -> QuantizedTensor:
            nonlocal alive, most
            tensor = read(self, name)
            alive += 1
            most = max(most, alive)

            def gone(_: object) -> None:
                nonlocal alive
                alive -= 1

            references.append(weakref.ref(tensor.parts["codes"], gone))
            return tensor

    references: list[Any] = []
    assert isinstance(source, VptqSource)
    export(tmp_path / "ours", Watched(source.checkpoint))
    assert len(references) == 3
    assert most == 1


# ------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vector_axis": "in", "group_size": 4}, "vector_axis is 'in', but a VPTQ layer like it"),
        (
            {"vector_axis": "in", "vector_width": 2, "group_size": 4},
            "but a VPTQ layer like it has",
        ),
        ({"method": "rq"}, "method is 'rq', but a VPTQ layer like it has 'vptq'"),
        ({"distance": "cosine"}, "distance is 'cosine'"),
        ({"traversal": "column"}, "traversal is 'column'"),
        ({"stride": 2}, "stride is 2"),
        ({"subspaces": 2}, "subspaces is 2"),
        ({"stages": [16, 8, 4]}, "stages is (16, 8, 4), but a VPTQ layer like it has (16, 8)"),
        ({"stages": [12, 8]}, "num_centroids names 12 entries"),
        ({"stages": [16, 1]}, "num_res_centroids names 1 entries"),
        ({"stages": [8, 16]}, "16 residual entries for 8 main ones"),
        ({"code_bits": [4, 4]}, "code_bits is (4, 4), but a VPTQ layer like it has (4, 3)"),
        ({"coefficients": [1.0, 1.0]}, "coefficients is (1.0, 1.0)"),
        ({"codebook_dtype": "int8"}, "codebooks in int8, but VPTQ's are floats"),
        ({"side_dtype": "float16"}, "side_dtype is 'float16', but a VPTQ layer like it has 'bfl"),
        ({"group_axis": "row", "group_size": 4}, "group_axis is 'row'"),
        ({"group_size": 17}, "3 groups of 17 columns and 4 outlier columns are not 40"),
        ({"group_size": 36}, "group_axis is 'column', but a VPTQ layer like it has 'tensor'"),
        ({"scale_axis": "tensor", "zero_axis": "tensor"}, "scale_axis is 'tensor'"),
        ({"zero_axis": "none"}, "zero_axis is 'none', but a VPTQ layer like it has 'column'"),
        ({"scale_axis": "none"}, "zero_axis is 'column', but a VPTQ layer like it has 'none'"),
        ({"rotation_size": 6}, "rotation_size is 6"),
        ({"uniform_columns": 18, "group_size": 6}, "not 40 in_features"),
        ({"outlier_entries": 0, "outlier_vector_length": 0}, "the upstream drops outliers"),
        ({"outlier_vector_length": 1}, "the upstream drops outliers"),
    ],
)
def test_a_matrix_that_vptq_cannot_hold_is_named(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    source = {"good": tensor_of(), "m.bad": tensor_of(bias=False, **changes)}
    with pytest.raises(UnsupportedError) as caught:
        export(tmp_path / "out", source)
    message = str(caught.value)
    assert message.startswith("matrix 'm.bad': ")
    assert says in message
    assert message.endswith("; keep it in a container")
    assert not any(tmp_path.iterdir())


def test_a_permutation_that_16_bits_cannot_hold_is_refused(tmp_path: Path) -> None:
    changes = {"group_axis": "tensor", "group_size": 0, "scale_axis": "none", "zero_axis": "none"}
    tensor = tensor_of(2, 65540, bias=False, **changes)
    with pytest.raises(UnsupportedError, match="a permutation of 65540 columns, but a packed"):
        export(tmp_path / "out", {"m": tensor})
    assert dequantize(tensor).shape == (2, 65540)


def test_a_bias_that_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensor = tensor_of()
    tensor = tensor.replace_parts(bias=torch.full((22,), 1 / 3))
    with pytest.raises(UnsupportedError, match=r"matrix 'm': its bias isn't exact in bfloat16"):
        export(tmp_path / "out", {"m": tensor})
    assert not any(tmp_path.iterdir())


def test_an_invalid_matrix_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    bad = tensor_of()
    bad.parts["codes"][3, 3, 0] = 16
    with pytest.raises(TensorError, match="matrix 'b': codes of stage 0 reach 16"):
        export(tmp_path / "out", {"a": tensor_of(), "b": bad})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "dense", "says"),
    [
        (["a", "a.b"], [], "'a.b' would lie in the quantised module 'a'"),
        (["a"], ["a.lora.weight"], "'a.lora.weight' would lie in the quantised module 'a'"),
        (["a"], ["a.indices"], "'a.indices' would lie in the quantised module 'a'"),
        (["a"], ["b.centroids.weight"], "has the name of a VPTQ codebook"),
        (["a\n"], [], "can't name a tensor"),
        (["a"], ["b\ud800"], "can't name a tensor"),
        (["a"], ["__metadata__"], "or has safetensors' own name"),
        ([], ["b"], "no matrices to write"),
    ],
)
def test_names_that_cannot_be_read_back_are_refused(
    names: list[str], dense: list[str], says: str, tmp_path: Path
) -> None:
    tensors = {name: tensor_of() for name in names}
    with pytest.raises(ContainerError) as caught:
        export(tmp_path / "out", tensors, dense={key: torch.ones(1) for key in dense})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.centroids", "a b", "ä", "0", "model.layers.10.q"])
def test_names_of_any_kind_come_back(name: str, tmp_path: Path) -> None:
    tensor = tensor_of()
    export(tmp_path / "out", {name: tensor})
    assert_same(open_source(tmp_path / "out")[name], tensor)
