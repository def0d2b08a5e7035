"""Matrices of ours as a VPTQ checkpoint that vptq and transformers load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqkernels.container.manifest import check_name
from vqkernels.errors import ContainerError, SpecError, UnsupportedError
from vqkernels.formats.vptq.layer import Layer, is_kept, owners
from vqkernels.formats.write_checkpoint import (
    SHARD_BYTES,
    Group,
    dense_group,
    with_quantization,
    write_checkpoint,
)
from vqkernels.packing import pack_codes
from vqkernels.source import outline_of
from vqkernels.tensor import QuantizedTensor

__all__ = ["export"]

_PIECE = 1 << 24  # code bits packed at once, a byte each


def export(
    folder: str | os.PathLike[str],
    source: Mapping[str, QuantizedTensor],
    *,
    config: Mapping[str, Any] | None = None,
    dense: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the matrices of `source` to a new `folder`, packed, one in memory at a time.

    config: config.json of the model, to which the quantization_config is added.
    dense: the model's other tensors, by key, written as they are (looked up twice).

    Reading it back gives the same matrices, specs included. Raises UnsupportedError, naming the
    matrix, where VPTQ can't hold it; TensorError for an invalid one; ContainerError where the
    folder can't be written. Then nothing is left behind.
    """
    layers: dict[str, Layer] = {}
    for name in source:
        try:
            layers[name] = Layer.from_outline(outline_of(source, name), packed=True)
        except SpecError as error:
            raise UnsupportedError(f"matrix {name!r}: {error}; keep it in a container") from error
    if not layers:
        raise ContainerError(f"{folder}: no matrices to write; name one at least")
    dense = dense or {}
    _check_places(folder, layers, dense)
    groups = [_matrix(source, name, layer) for name, layer in layers.items()]
    kept = []
    for key in dense:
        groups.append(dense_group(dense, key))
        shape, _ = groups[-1].tensors[key]
        module, _, last = key.rpartition(".")
        # what transformers would take for a linear layer without a config
        if last == "weight" and len(shape) == 2 and not any(is_kept(n, [module]) for n in layers):
            kept.append(module)
    quantization = {
        "quant_method": "vptq",
        "config_for_layers": {name: layer.to_config() for name, layer in layers.items()},
        "modules_to_not_convert": kept,
    }
    content = with_quantization(config, quantization)
    write_checkpoint(folder, content, groups, shard_bytes=shard_bytes)


def _check_places(
    folder: str | os.PathLike[str], layers: Mapping[str, Layer], dense: Mapping[str, Tensor]
) -> None:
    """Nothing may lie in a quantised module but its own tensors, nor look like one's."""
    for name in [*layers, *dense]:
        check_name(name)
        if inside := next((owner for owner in owners(name) if owner in layers), None):
            raise ContainerError(
                f"{folder}: {name!r} would lie in the quantised module {inside!r}; rename it"
            )
    for key in dense:
        if key.endswith(".centroids.weight"):
            raise ContainerError(
                f"{folder}: tensor {key!r} has the name of a VPTQ codebook; rename it"
            )


def _matrix(source: Mapping[str, QuantizedTensor], name: str, layer: Layer) -> Group:
    outline = outline_of(source, name)
    dtype: torch.dtype = getattr(torch, outline.spec.codebook_dtype)
    # of several dtypes that are read, the first is written
    stored = layer.stored((dtype,), bias=outline.bias)
    tensors = {f"{name}.{suffix}": (s.shape, s.dtypes[0]) for suffix, s in stored.items()}
    return Group(tensors, partial(_stored, source, name, layer, dtype))


def _stored(
    source: Mapping[str, QuantizedTensor], name: str, layer: Layer, dtype: torch.dtype
) -> dict[str, Tensor]:
    tensor = source[name].to("cpu")
    tensor.validate(f"matrix {name!r}")
    return {f"{name}.{suffix}": v for suffix, v in _parts(name, tensor, layer, dtype)}


def _parts(
    name: str, tensor: QuantizedTensor, layer: Layer, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    parts = tensor.parts
    yield "indices", _packed(parts["codes"], layer)
    yield "centroids.weight", parts["codebook_0"].reshape(layer.groups, -1)
    if layer.residual_entries:
        yield "res_centroids.weight", parts["codebook_1"].reshape(layer.groups, -1)
    if layer.outliers:
        yield "outlier_indices", parts["outlier_codes"][None].to(torch.uint16).view(torch.int16)
        yield "outlier_centroids.weight", parts["outlier_codebook"].reshape(1, -1)
    if layer.permuted:
        yield "perm", parts["permutation"].view(torch.int16)
    if layer.norm_dim is not None:
        yield "weight_scale", parts["scale"]
        yield "weight_bias", parts["zero"]
    if tensor.bias is not None:
        bias = tensor.bias.to(dtype)
        if not torch.equal(bias.to(torch.float32), tensor.bias):
            raise UnsupportedError(
                f"matrix {name!r}: its bias isn't exact in {str(dtype).removeprefix('torch.')}, "
                f"which a VPTQ layer's bias has; round it first"
            )
        yield "bias", bias


def _packed(codes: Tensor, layer: Layer) -> Tensor:
    """Words `[groups, rows, words]` of codes `[rows, columns, stages]`."""
    bits, size = layer.code_bits, layer.group_size
    step = max(1, _PIECE // (size * sum(bits)))
    groups = [
        torch.cat([pack_codes(piece, bits) for piece in torch.split(columns, step)])
        for columns in torch.split(codes, size, dim=1)
    ]
    return torch.stack(groups)
