"""Layers of the vptq wheel with random codes: the oracle of what is read from a checkpoint.

Keys, shapes and packing are the wheel's own. The wheel imports what it needs only to quantise
and to load models (transformers, gradio's neighbours); stand-ins keep that out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import random
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqkernels.errors import VqError
from vqkernels.formats.checkpoint import Checkpoint
from vqkernels.formats.vptq import VptqSource

__all__ = [
    "OUTLIERS",
    "PLAIN",
    "UNPACKED",
    "Case",
    "Upstream",
    "case_of",
    "draw_case",
    "make_layer",
    "refusal",
    "upstream",
    "write_folder",
]


@dataclasses.dataclass(frozen=True)
class Upstream:
    """What the tests use of the wheel."""

    layer: Any
    dequant: Any
    pack_index: Any


@functools.cache
def upstream() -> Upstream:
    """The wheel, or a skipped test where there is none for this Python."""
    # what it prints: that it found no CUDA kernels
    with _stand_ins(), contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip("vptq", reason="there is no wheel of vptq for this Python")
        gemm, pack = sys.modules["vptq.ops.quant_gemm"], sys.modules["vptq.utils.pack"]
        layer = sys.modules["vptq.layers.vqlinear"].VQuantLinear
    # on a machine with a GPU too, the torch path is the reference
    gemm.__dict__["__cuda_ops_installed"] = False
    return Upstream(layer, gemm.dequant, pack.pack_index)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules for what the wheel imports and its layers don't use."""
    names = ("accelerate", "huggingface_hub", "sentence_transformers", "transformers")
    stubs: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    nested = "sentence_transformers.SentenceTransformer"
    stubs[nested] = types.ModuleType(nested)
    stubs[nested].SentenceTransformer = type("SentenceTransformer", (), {})
    stubs["transformers"].AutoModelForCausalLM = type("AutoModelForCausalLM", (), {})
    real = {name: sys.modules.pop(name) for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(real)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to make: its config as in a checkpoint, its dtype, and how codes are stored."""

    config: dict[str, Any]
    dtype: torch.dtype
    seed: int = 0

    @property
    def packed(self) -> bool:
        """Whether its codes are packed."""
        return bool(self.config["is_indice_packed"])


PLAIN: dict[str, Any] = {
    "in_features": 40,
    "out_features": 22,
    "vector_lens": [-1, 4],
    "num_centroids": [-1, 32],
    "num_res_centroids": [-1, 8],
    "group_num": 1,
    "group_size": 40,
    "outlier_size": 0,
    "indices_as_float": False,
    "enable_norm": True,
    "enable_perm": True,
    "is_indice_packed": True,
    "bias": True,
}
OUTLIERS = {
    "vector_lens": [3, 4],
    "num_centroids": [5, 32],
    "outlier_size": 4,
    "group_size": 36,
}
UNPACKED = {"is_indice_packed": False}


def case_of(dtype: torch.dtype = torch.float16, **changes: Any) -> Case:
    return Case({**PLAIN, **changes}, dtype)


def draw_case(seed: int) -> Case:
    """A small layer of any kind that the wheel reads rightly."""
    draw = random.Random(seed)
    length, bits = draw.choice([1, 2, 3, 4, 6, 8, 12]), draw.randint(1, 9)
    residual = draw.choice([0, draw.randint(1, bits)])
    outliers = draw.choice([0, 0, 1, 3, 8])
    outlier_length = draw.choice([2, 4, 5, 8]) if outliers else -1
    groups, group_size = draw.choice([1, 1, 2, 3]), draw.randint(17, 40)
    inputs = groups * group_size + outliers
    packed = draw.random() < 0.7
    config = {
        "in_features": inputs,
        "out_features": draw.randint(1, 50),
        "vector_lens": [outlier_length, length],
        "num_centroids": [draw.choice([1, 7, 16, 300]) if outliers else -1, 1 << bits],
        "num_res_centroids": [-1, 1 << residual if residual else -1],
        "group_num": groups,
        "group_size": group_size,
        "outlier_size": outliers,
        "indices_as_float": draw.random() < 0.3,
        "enable_norm": draw.random() < 0.6,
        "enable_perm": draw.random() < 0.6,
        "is_indice_packed": packed,
        "bias": draw.random() < 0.4,
    }
    if config["enable_norm"] and draw.random() < 0.3:
        config["norm_dim"] = draw.choice([0, 1])
    return Case(config, draw.choice([torch.float16, torch.bfloat16]), seed)


def make_layer(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """The state of a layer of the wheel with random contents, and its weight by their dequant."""
    generator = torch.Generator().manual_seed(case.seed)
    config = {name: value for name, value in case.config.items() if name != "norm_dim"}
    # an unpacked layer with residuals can't be made: it reads these two before it sets them
    rows = -(-config["out_features"] // config["vector_lens"][1])
    early = {"num_indices": rows, "group_size": config["group_size"]}
    kind = type("VQuantLinear", (upstream().layer,), early)
    layer = kind(**config, dtype=case.dtype, enable_proxy_error=False).requires_grad_(False)
    codes = _codes(layer, generator)
    for name, value in layer.named_parameters():
        if value.is_floating_point() and "indices" not in name:
            value.copy_(torch.randn(value.shape, generator=generator))
    for name, value in codes.items():
        getattr(layer, name).data = value
    if layer.enable_perm:
        perm = torch.randperm(layer.in_features, generator=generator)
        layer.perm.data = perm.to(torch.uint16).view(torch.int16) if case.packed else perm
    if case.config.get("norm_dim") == 1:
        for name in ("weight_scale", "weight_bias"):
            values = torch.randn(layer.out_features, generator=generator)
            getattr(layer, name).data = values.to(case.dtype)
    return dict(layer.state_dict()), _weight(case, layer)


def _codes(layer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    def draw(entries: int, *shape: int) -> Tensor:
        return torch.randint(entries, shape, generator=generator).to(torch.uint16)

    shape = (layer.num_codebooks, layer.num_indices, layer.group_size)
    main, residual = draw(layer.num_centroids, *shape), None
    if layer.enable_residual:
        residual = draw(layer.num_res_centroids, *shape)
    stored_as = torch.float16 if layer.indices_as_float else torch.int16
    codes = {}
    if layer.is_indice_packed:
        bits, res_bits = layer.index_bits, layer.res_index_bits
        codes["indices"] = upstream().pack_index(main, bits, residual, res_bits)
    else:
        codes["indices"] = main.view(stored_as)
        if residual is not None:
            codes["res_indices"] = residual.view(stored_as)
    if layer.enable_outlier:
        outliers = draw(layer.num_outlier_centroids, *layer.outlier_indices.shape)
        codes["outlier_indices"] = outliers.view(stored_as)
    return codes


def _weight(case: Case, layer: Any) -> Tensor:
    """Their dequant, called as their quant_gemm does."""
    by_row = case.config.get("norm_dim") == 1
    perm = layer.perm if layer.enable_perm else None
    if perm is not None:  # the wheel takes the bytes of an int64 permutation for 16-bit numbers
        perm = perm.to(torch.uint16)
    weight: Tensor = upstream().dequant(
        indices=layer.indices,
        centroids=_book(layer.centroids, layer.num_codebooks, layer.vector_len),
        outlier_indices=layer.outlier_indices,
        outlier_centroids=_book(layer.outlier_centroids, 1, layer.outlier_vector_len),
        res_indices=layer.res_indices,
        res_centroids=_book(layer.res_centroids, layer.num_codebooks, layer.vector_len),
        perm=perm,
        weight_scale=layer.weight_scale,
        weight_bias=layer.weight_bias,
        is_indice_packed=layer.is_indice_packed,
        enable_outlier=layer.enable_outlier,
        enable_residual=layer.enable_residual,
        enable_perm=layer.enable_perm,
        enable_norm=layer.enable_norm and not by_row,
        num_centroids=layer.num_centroids,
        num_outlier_centroids=layer.num_outlier_centroids,
        num_res_centroids=layer.num_res_centroids,
        padding=layer.padding,
        outlier_padding=layer.outlier_padding,
        num_codebooks=layer.num_codebooks,
        group_size=layer.group_size,
        outlier_size=layer.outlier_size,
        vector_len=layer.vector_len,
        outlier_vector_len=layer.outlier_vector_len,
    )
    if layer.enable_norm and by_row:  # as their development branch does it; no wheel has it
        weight = weight * layer.weight_scale.unsqueeze(1)
        weight = weight + layer.weight_bias.unsqueeze(1)
    return weight


def _book(embedding: Any, sets: int, length: int) -> Tensor | None:
    if embedding is None:
        return None
    weight: Tensor = embedding.weight
    return weight.view(sets, -1, length)


def write_folder(
    folder: Path,
    layers: Iterable[tuple[str, dict[str, Any], dict[str, Tensor]]],
    *,
    dense: dict[str, Tensor] | None = None,
    **quantization: Any,
) -> None:
    """A checkpoint of `(name, config, state)` layers, in one file, and what else it says."""
    tensors, configs = dict(dense or {}), {}
    for name, config, state in layers:
        configs[name] = config
        tensors |= {f"{name}.{key}": value.clone().contiguous() for key, value in state.items()}
    described = {"quant_method": "vptq", "config_for_layers": configs, **quantization}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": described}))
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, *, remove: str = "", **changes: Any) -> str:
    """What opening a sound layer with another config says."""
    state, _ = make_layer(case_of())
    config = {name: value for name, value in {**PLAIN, **changes}.items() if name != remove}
    write_folder(folder, [("m.q", config, state)])
    with pytest.raises(VqError) as caught:
        VptqSource(Checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert "m.q" in message
    assert message.startswith(str(folder))
    return message
