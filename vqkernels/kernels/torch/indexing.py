"""Shared by the torch kernels: what torch can't run, and codes as rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernels.linear import pack_sets
from vqkernels.problem import Problem
from vqkernels.tensor import QuantizedTensor

__all__ = ["entry_index", "unsupported_activations"]


def unsupported_activations(problem: Problem, device: Device) -> str | None:
    """The sentence that rules out what no torch kernel takes, or None."""
    if device.kind == "cpu" and problem.dtype != "float32":
        return f"CPU kernels take float32 activations, not {problem.dtype}"
    return None


def entry_index(tensor: QuantizedTensor) -> Tensor:
    """Row of each code in the flattened `pack_books`: int32 `[rows, columns, stages]`."""
    spec = tensor.spec
    codes = tensor.parts["codes"].long()
    index = codes + torch.tensor([0, *spec.stages[:-1]], device=codes.device).cumsum(0)
    sets = {name: numbers.to(codes.device) for name, numbers in pack_sets(tensor).items()}
    if "row_sets" in sets:
        index += sets["row_sets"][:, None, None] * sum(spec.stages)
    if "column_sets" in sets:
        index += sets["column_sets"][:, None] * sum(spec.stages)
    return index.int()
