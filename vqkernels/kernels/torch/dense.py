"""dense: the baseline that every other kernel is compared with.

The weight is decoded once, at packing, and kept in the problem's dtype; a call is one BLAS
product. It moves 2 or 4 bytes a weight where codes move a quarter of a byte or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels.torch.indexing import unsupported_activations
from vqkernels.problem import Problem
from vqkernels.space import Config, Space
from vqkernels.tensor import QuantizedTensor

SPACE = Space()


def supports(problem: Problem, device: Device) -> str | None:
    """Everything that torch can multiply here."""
    return unsupported_activations(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """There is nothing to choose."""
    return Config()


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """A dense weight and its product."""
    size = problem.torch_dtype.itemsize
    weight = (problem.n * problem.k + problem.n * problem.bias) * size
    return Footprint(weight_bytes=weight, workspace_bytes=0, flops=problem.flops)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """The decoded weight `[n, k]` in x's dtype."""
    arrays = {"weight": tensor.decode(torch.float32).to(problem.torch_dtype)}
    if tensor.bias is not None:
        arrays["bias"] = tensor.bias.to(problem.torch_dtype)
    return Packed(arrays)


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """One BLAS call."""

    def run(packed: Packed, x: Tensor, out: Tensor) -> None:
        if "bias" in packed:
            torch.addmm(packed["bias"], x, packed["weight"].T, out=out)
        else:
            torch.mm(x, packed["weight"].T, out=out)

    return run


KERNEL = Kernel(
    name="dense",
    op="linear",
    backend="torch",
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="decoded once, then the BLAS: the baseline",
    reads="dense",
    wide_vectors=True,
    rounds_weights=True,
    packs_anywhere=True,
)
