"""Several weights of one input as one: the rows of q, k and v, or of gate and up, in one product.

A small layer takes less time than its launch; a fused one is a Problem like any other, for every
kernel. Codebooks stay each weight's own: groups of rows, small enough to begin where a weight does,
name them. The copies of a codebook that this makes are dropped again where a weight is packed for a
GPU (`linear.share_books`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqkernels.errors import UnsupportedError
from vqkernels.parts import effective_bits
from vqkernels.spec import CodebookSpec, ScaleAxis
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = ["fuse", "fuse_named", "fused_spec"]

# Copies of codebooks may at most double what is stored.
_MOST_GROWTH = 2.0

# One for all rows, so that weights which share a launch must share it.
_COMMON = ("permutation", "rotation", "uniform_scale", "uniform_zero", "outlier_codebook")


def fuse(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """All rows of `tensors`, in order: `x @ fused.T` is their products side by side.

    `y.split([one.n for one in tensors], dim=-1)` gives these back, as views. A weight without a
    bias gets one of zeros where another has one. Raises UnsupportedError where the weights differ
    in format, inputs, or in what all rows of a weight share (permutation, rotation, column scales),
    or where their rows have no common group.
    """
    if not tensors:
        raise UnsupportedError("no weights to fuse; give one at least")
    first, sizes = tensors[0], [one.n for one in tensors]
    if len(tensors) == 1:
        return first
    _check_alike(tensors)
    spec = fused_spec(first.spec, sizes, first.k)
    if _books_alike(tensors):
        spec = dataclasses.replace(
            spec, group_axis=first.spec.group_axis, group_size=first.spec.group_size
        )
    parts = {name: _join(name, tensors, spec) for name in first.parts if name != "bias"}
    if any(one.bias is not None for one in tensors):
        parts["bias"] = torch.cat([_bias(one) for one in tensors])
    return QuantizedTensor(spec, sum(sizes), first.k, parts)


def fused_spec(spec: CodebookSpec, sizes: Sequence[int], k: int) -> CodebookSpec:
    """The format of weights `[n, k]` in `spec`, n of `sizes`, as one with a codebook set for each.

    Raises UnsupportedError as `fuse` does, for what the shapes tell.
    """
    if len(sizes) == 1:
        return spec
    step = row_step(spec)
    if uneven := [n for n in sizes[:-1] if n % step]:
        raise UnsupportedError(
            f"a weight of {uneven[0]} rows can't be followed by another: the format cuts rows in "
            f"blocks of {step}"
        )
    if spec.group_axis == "column":
        raise UnsupportedError(
            "codebooks for groups of columns: a fused weight has them for groups of rows only"
        )
    # a group begins where a weight does; the last weight's tail may be short
    rows = spec.group_size or math.gcd(*sizes[:-1])
    fused = dataclasses.replace(
        spec,
        group_axis="row",
        group_size=rows,
        scale_axis=_by_row(spec.scale_axis),
        zero_axis=_by_row(spec.zero_axis),
    )
    stored = effective_bits([(fused, sum(sizes), k)]).per_weight()
    apart = effective_bits([(spec, n, k) for n in sizes]).per_weight()
    if stored > _MOST_GROWTH * apart:
        raise UnsupportedError(
            f"weights of {', '.join(map(str, sizes))} rows have no larger common group than {rows} "
            f"rows: {stored:.3g} bits a weight where they take {apart:.3g} apart"
        )
    return fused


def fuse_named(
    tensors: Mapping[str, QuantizedTensor], groups: Mapping[str, Sequence[str]]
) -> dict[str, QuantizedTensor]:
    """`tensors` with the layers of each group as one, for a model whose layers are fused.

    groups: `{"qkv_proj": ("q_proj", "k_proj", "v_proj")}` makes `block.0.qkv_proj` of
    `block.0.q_proj` and the others, with or without `.weight`, wherever all are there.
    """
    left = dict(tensors)
    for fused, names in groups.items():
        for name in tensors:
            owner, _, last = name.removesuffix(".weight").rpartition(".")
            if last != names[0]:
                continue
            ending = ".weight" if name.endswith(".weight") else ""
            prefix = f"{owner}." if owner else ""
            wanted = [f"{prefix}{one}{ending}" for one in names]
            if all(one in left for one in wanted):
                left[f"{prefix}{fused}{ending}"] = fuse([left.pop(one) for one in wanted])
    return left


def _by_row(axis: ScaleAxis) -> ScaleAxis:
    return "row" if axis == "tensor" else axis


def _check_alike(tensors: Sequence[QuantizedTensor]) -> None:
    first = tensors[0]
    columns = [
        name
        for name, axis in (("scale", first.spec.scale_axis), ("zero", first.spec.zero_axis))
        if axis == "column"
    ]
    for number, other in enumerate(tensors[1:], start=2):
        if (other.spec, other.k) != (first.spec, first.k):
            what = "format" if other.spec != first.spec else f"number of inputs ({other.k})"
            raise UnsupportedError(
                f"weight {number} has another {what} than the first; only weights of one input in "
                f"one format are fused"
            )
        for name in (*_COMMON, *columns):
            if name in first.parts and not torch.equal(first.parts[name], other.parts[name]):
                raise UnsupportedError(
                    f"weight {number} has another {name} than the first; all rows share one, so "
                    f"quantise these weights together"
                )


def _books_alike(tensors: Sequence[QuantizedTensor]) -> bool:
    """Whether one set serves all rows as they are."""
    first, *others = tensors
    names = [name for name in first.parts if name.startswith("codebook_")]
    return first.spec.group_axis == "tensor" and all(
        torch.equal(first.parts[name], other.parts[name]) for other in others for name in names
    )


def _join(name: str, tensors: Sequence[QuantizedTensor], spec: CodebookSpec) -> Tensor:
    parts = [one.parts[name] for one in tensors]
    old = tensors[0].spec
    if name.startswith("codebook_"):
        if spec.group_axis == "tensor":
            return parts[0]
        if old.group_axis == "row":
            return torch.cat(parts)
        groups = [-(-one.n // spec.group_size) for one in tensors]
        return torch.cat(
            [part.repeat_interleave(g, 0) for part, g in zip(parts, groups, strict=True)]
        )
    if name in ("scale", "zero"):
        axis = old.scale_axis if name == "scale" else old.zero_axis
        if axis == "column":
            return parts[0]
        return torch.cat([part.expand(one.n) for part, one in zip(parts, tensors, strict=True)])
    return parts[0] if name in _COMMON else torch.cat(parts)


def _bias(tensor: QuantizedTensor) -> Tensor:
    if tensor.bias is not None:
        return tensor.bias
    return torch.zeros(tensor.n, device=tensor.parts["codes"].device)
