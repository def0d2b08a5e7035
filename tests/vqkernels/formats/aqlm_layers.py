"""Layers of the aqlm wheel with random codes: the oracle of what is read from a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqkernels.formats.aqlm import AqlmSource
from vqkernels.formats.checkpoint import Checkpoint

__all__ = ["Case", "Upstream", "draw_case", "make_layer", "same_bits", "upstream", "write_folder"]


@dataclasses.dataclass(frozen=True)
class Upstream:
    """What the tests use of the wheel."""

    layer: Any
    pack: Any
    unpack: Any
    dequantize: Any


@functools.cache
def upstream() -> Upstream:
    """The wheel, or a skipped test where there is none."""
    aqlm = pytest.importorskip("aqlm")
    from aqlm import utils

    return Upstream(
        aqlm.QuantizedLinear, utils.pack_int_data, utils.unpack_int_data, utils._dequantize_weight
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to make: the config's four numbers, the grid of its codes, and its dtype."""

    rows: int
    columns: int
    codebooks: int = 2
    bits: int = 8
    width: int = 1
    length: int = 8
    dtype: torch.dtype = torch.float16
    bias: bool = False
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Its quantization_config."""
        return {
            "quant_method": "aqlm",
            "num_codebooks": self.codebooks,
            "nbits_per_codebook": self.bits,
            "out_group_size": self.width,
            "in_group_size": self.length,
            "linear_weights_not_to_quantize": ["lm_head.weight"],
        }


def draw_case(seed: int) -> Case:
    """A small layer of any kind."""
    draw = random.Random(seed)
    bits = draw.choice([1, 2, 4, 7, 8, 8, 9, 10, 12, 16])
    large = bits > 10  # all else at most would take 150 MB of codebooks
    return Case(
        rows=draw.randint(1, 24),
        columns=draw.randint(1, 24),
        codebooks=draw.choice([1, 2] if large else [1, 1, 2, 3, 4, 8, 9]),
        bits=bits,
        width=draw.choice([1, 2] if large else [1, 1, 2, 3, 4]),
        length=draw.choice([1, 2, 3, 4, 8] if large else [1, 2, 3, 4, 8, 8, 16, 17, 32]),
        dtype=draw.choice([torch.float16, torch.bfloat16]),
        bias=draw.random() < 0.4,
        seed=seed,
    )


def make_layer(case: Case) -> tuple[Any, Tensor]:
    """A layer of the wheel with random contents, and its weight by their torch code.

    Codes are from end to end of their range; entries are of one magnitude of many, some of them
    zeros of either sign.
    """
    generator = torch.Generator().manual_seed(case.seed)
    layer = upstream().layer(
        case.columns * case.length, case.rows * case.width, case.length, case.width,
        case.codebooks, case.bits, bias=case.bias, dtype=case.dtype,
    ).requires_grad_(False)  # fmt: skip
    entries, shape = 1 << case.bits, layer.codes.shape
    codes = torch.randint(entries, shape, generator=generator, dtype=torch.int32)
    codes.view(-1)[0], codes.view(-1)[-1] = 0, entries - 1
    layer.codes.data = upstream().pack(codes, case.bits)
    size = 10.0 ** float(torch.empty(()).uniform_(-5, 3, generator=generator))
    for name, value in layer.named_parameters():
        if value.is_floating_point():
            random_values = torch.randn(value.shape, generator=generator)
            value.copy_(random_values * size if name == "codebooks" else random_values)
    zeros = torch.rand(layer.codebooks.shape, generator=generator) < 0.2
    signs = torch.randint(2, zeros.shape, generator=generator)
    layer.codebooks[zeros] = torch.where(signs == 0, 0.0, -0.0).to(case.dtype)[zeros]
    codes = upstream().unpack(layer.codes, case.bits)
    return layer, upstream().dequantize(codes, layer.codebooks, layer.scales)


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Tensor]],
    dense: Mapping[str, Tensor] | None = None,
) -> AqlmSource:
    """A checkpoint of the layers' tensors in one file, opened."""
    tensors = dict(dense or {})
    for name, state in layers.items():
        tensors |= {f"{name}.{key}": value.clone().contiguous() for key, value in state.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    save_file(tensors, folder / "model.safetensors")
    return AqlmSource(Checkpoint(folder))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN is itself, and 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return torch.equal(first, second)
