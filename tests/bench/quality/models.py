"""A tiny dense model, quantised, and calibrations made up for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqkernels import container
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

SPEC = CodebookSpec(method="rq", vector_length=4, stages=(16, 8), scale_axis="row")
QUERY, OUTPUT = "0.query.weight", "0.output.weight"


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a calibration knows of a layer."""

    diagonal: Tensor
    gram: Tensor | None = None
    inputs: Tensor | None = None


def dense() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {QUERY: (24, 32), OUTPUT: (16, 24), "embed.weight": (9, 32), "norm.weight": (32,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def quantised() -> dict[str, QuantizedTensor]:
    return {name: quantize(dense()[name], SPEC, seed=1) for name in (QUERY, OUTPUT)}


def make_model(path: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    save_file(tensors or dense(), path)
    return path


def make_quantised(path: Path, tensors: dict[str, QuantizedTensor] | None = None) -> Path:
    made = {QUERY: {"seed": 1, "holdout_error": 0.25}} if tensors is None else {}
    container.save(path, tensors or quantised(), provenance={"note": "mine"}, made=made)
    return path


def inputs(k: int, tokens: int = 50) -> Tensor:
    """Unlike one another, and correlated."""
    generator = torch.Generator().manual_seed(k)
    mix = torch.randn(k, k, generator=generator)
    return torch.randn(tokens, k, generator=generator) @ mix
