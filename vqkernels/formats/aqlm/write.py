"""Matrices as an AQLM checkpoint, where all of them are in one scheme."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqkernels.container.manifest import check_name
from vqkernels.errors import ContainerError, SpecError, UnsupportedError
from vqkernels.formats.aqlm.scheme import KEPT, Scheme
from vqkernels.formats.write_checkpoint import (
    SHARD_BYTES,
    Group,
    dense_group,
    with_quantization,
    write_checkpoint,
)
from vqkernels.source import outline_of
from vqkernels.tensor import QuantizedTensor

__all__ = ["export"]


def export(
    folder: str | os.PathLike[str],
    source: Mapping[str, QuantizedTensor],
    *,
    config: Mapping[str, Any] | None = None,
    dense: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the matrices of `source` to a new `folder`, one in memory at a time.

    config: config.json of the model, to which the quantization_config is added.
    dense: the model's other tensors, by key, written as they are (looked up twice).

    Reading it back gives the same parts; `method`, `distance`, `traversal` and `code_bits` of the
    specs become AQLM's. Raises UnsupportedError, naming the matrix, where AQLM can't hold it, or
    not in one checkpoint with the others; TensorError for an invalid one; ContainerError where the
    folder can't be written. Then nothing is left behind.
    """
    if not source:
        raise ContainerError(f"{folder}: no matrices to write; name one at least")
    scheme = _common_scheme(source)
    groups, matrices = [], []
    for name in source:
        stored = scheme.stored(outline_of(source, name))
        tensors = {f"{name}.{suffix}": entry for suffix, entry in stored.items()}
        groups.append(Group(tensors, partial(_stored, source, name, scheme)))
    dense = dense or {}
    for key in dense:
        if key.rpartition(".")[0] in source or key.endswith((".codes", ".codebooks")):
            raise ContainerError(
                f"{folder}: tensor {key!r} would be taken for a quantised module's; rename it"
            )
        groups.append(dense_group(dense, key))
        shape, _ = groups[-1].tensors[key]
        if key.endswith(".weight") and len(shape) == 2:
            matrices.append(key)
    quantization = {
        "quant_method": "aqlm",
        **dataclasses.asdict(scheme),
        KEPT: _names_kept(source, matrices),
    }
    content = with_quantization(config, quantization)
    write_checkpoint(folder, content, groups, shard_bytes=shard_bytes)


def _common_scheme(source: Mapping[str, QuantizedTensor]) -> Scheme:
    schemes: dict[Scheme, str] = {}
    for name in source:
        check_name(name)
        try:
            schemes.setdefault(Scheme.from_outline(outline_of(source, name)), name)
        except SpecError as error:
            raise UnsupportedError(f"matrix {name!r}: {error}; keep it in a container") from error
    (first, first_name), *others = schemes.items()
    if others:
        other, name = others[0]
        field = next(f.name for f in dataclasses.fields(first) if _differ(first, other, f.name))
        raise UnsupportedError(
            f"matrix {name!r}: {field} is {getattr(other, field)}, but {getattr(first, field)} in "
            f"{first_name!r}, and an AQLM checkpoint has one; export them to two"
        )
    return first


def _differ(first: Scheme, other: Scheme, field: str) -> bool:
    return bool(getattr(first, field) != getattr(other, field))


def _names_kept(source: Mapping[str, QuantizedTensor], keys: Sequence[str]) -> list[str]:
    """What the config has to say of dense matrices, so that loaders don't look for their codes.

    Their keys, as AQLM's own checkpoints name them; and their modules for transformers 5, which
    keeps modules that begin or end with a name.
    """
    modules = [
        module
        for module in (key.removesuffix(".weight") for key in keys)
        if not any(name.startswith(module) or name.endswith(module) for name in source)
    ]
    return sorted([*keys, *modules])


def _stored(source: Mapping[str, QuantizedTensor], name: str, scheme: Scheme) -> dict[str, Tensor]:
    tensor = source[name].to("cpu")
    where = f"matrix {name!r}"
    tensor.validate(where)
    parts, half = tensor.parts, 1 << (scheme.nbits_per_codebook - 1)
    # the top bit extended: half and more become negative
    codes = (parts["codes"].to(torch.int32) ^ half) - half
    shape = (-1, scheme.out_group_size, scheme.in_group_size)
    books = [parts[f"codebook_{stage}"].reshape(shape) for stage in range(scheme.num_codebooks)]
    stored = {
        "codes": codes.to(scheme.code_dtype),
        "codebooks": torch.stack(books),
        "scales": _group_scales(parts["scale"], scheme.out_group_size, where),
    }
    if tensor.bias is not None:
        stored["bias"] = _bias(tensor.bias, parts["scale"].dtype, where)
    return {f"{name}.{suffix}": value for suffix, value in stored.items()}


def _group_scales(scale: Tensor, width: int, where: str) -> Tensor:
    """`[groups, 1, 1, 1]` of a scale for each row, which has to be the same in a group."""
    groups = scale.reshape(-1, width)
    # their bits, for 0 and -0 are equal
    bits = groups.view(torch.int32 if scale.dtype == torch.float32 else torch.int16)
    if differing := (bits != bits[:, :1]).any(dim=1).nonzero().flatten().tolist():
        start = differing[0] * width
        raise UnsupportedError(
            f"{where}: scales of rows {start} to {start + width - 1} differ, but AQLM has one for "
            f"{width} rows; keep it in a container"
        )
    return groups[:, 0].reshape(-1, 1, 1, 1)


def _bias(bias: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    rounded = bias.to(dtype)
    if not torch.equal(rounded.to(torch.float32), bias):
        raise UnsupportedError(
            f"{where}: its bias isn't exact in {str(dtype).removeprefix('torch.')}, which an AQLM "
            f"layer's bias has; round it first"
        )
    return rounded
