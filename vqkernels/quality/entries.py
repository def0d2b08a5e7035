"""What the dtype of codebook entries costs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vqkernels.quality.distortion import distortion
from vqkernels.quality.pieces import share
from vqkernels.quantize.prepare import target_of
from vqkernels.quantize.refit import refit
from vqkernels.quantize.target import Target
from vqkernels.tensor import QuantizedTensor, scaled_codebook

__all__ = ["rounding_cost", "with_best_entries"]


def rounding_cost(weight: Tensor, tensor: QuantizedTensor) -> float:
    """By how much the error of `tensor` is larger than with the best float32 entries: 0.02 is 2 %.

    Codes stay as they are. Where stages add up, entries that were not solved for together leave
    something besides what rounding costs, which is in it too. Errors as for `distortion`.
    """
    stored = distortion(weight, tensor).relative_error
    best = distortion(weight, with_best_entries(weight, tensor)).relative_error
    return share(stored - best, best)


def with_best_entries(weight: Tensor, tensor: QuantizedTensor) -> QuantizedTensor:
    """`tensor` with float32 entries, those of all stages with the least squared error together.

    Codes, scales, side columns and rotation stay; entries without a code too.
    """
    tensor = tensor.to("cpu")
    spec = dataclasses.replace(tensor.spec, codebook_dtype="float32")
    target, _ = target_of(tensor, Target(weight.detach().cpu().float()))
    vectors = target.vectors(spec)
    stages = range(len(spec.stages))
    cells = vectors.cells.clamp(min=0)  # filling weighs nothing
    codes = tensor.parts["codes"].flatten(0, 1).long()[cells]
    books = [scaled_codebook(tensor.spec, tensor.parts, s, torch.float32) for s in stages]
    found = refit(
        vectors.points,
        list(codes.unbind(-1)),
        [book.flatten(0, 1) for book in books],
        weights=vectors.weights,
    )
    parts = {name: part for name, part in tensor.parts.items() if name != "codebook_scale"}
    for stage, (book, old) in enumerate(zip(found, books, strict=True)):
        parts[f"codebook_{stage}"] = book.reshape(old.shape) / spec.coefficient(stage)
    return QuantizedTensor(spec, tensor.n, tensor.k, parts)
