"""What an AQLM config says of all layers: four numbers, and with them which tensors a layer has.

A weight `[n, k]` is the sum of one entry of each of M codebooks for every `[width, length]` block,
times a scale for every `width` rows (Egiazarian et al., 2024, arXiv:2401.06118). Under a module's
name lie, of `bits` bits a code:

    codes      [n/width, k/length, M]      int8, above 8 bits int16: two's complement of `bits` bits
    codebooks  [M, 2^bits, width, length]  float
    scales     [n/width, 1, 1, 1]          float
    bias       [n]                         float, if there is one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from vqkernels.errors import SpecError, UnsupportedError
from vqkernels.formats.checkpoint import shortened
from vqkernels.source import Outline
from vqkernels.spec import CodebookSpec

__all__ = ["FLOATS", "KEPT", "Scheme"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# The config's list of dense layers.
KEPT = "linear_weights_not_to_quantize"

# Fields of a spec that say how codes were found or are packed, and nothing of the weight.
_WITHOUT_MEANING = ("method", "distance", "traversal", "code_bits")

# Sizes beyond these are no layer's; a spec of the largest is made in no time.
_MOST = {"nbits_per_codebook": 16, "num_codebooks": 1024}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The four numbers of an AQLM config; the defaults are transformers'."""

    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    out_group_size: int = 1
    in_group_size: int = 8

    @classmethod
    def from_config(cls, quantization: Mapping[str, Any]) -> Scheme:
        """The scheme of a quantization_config. Raises SpecError for what no layer can have."""
        found = {}
        for field in dataclasses.fields(cls):
            value = found[field.name] = quantization.get(field.name, field.default)
            most = _MOST.get(field.name, 1 << 16)
            # True is an int to Python
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise SpecError(
                    f"{field.name} must be a whole number from 1 to {most}, not {shortened(value)}"
                )
        return cls(**found)

    @classmethod
    def from_outline(cls, outline: Outline) -> Scheme:
        """The scheme that holds a matrix of ours. Raises SpecError where there is none."""
        spec = outline.spec
        bits = spec.stages[0].bit_length() - 1
        if set(spec.stages) != {1 << bits} or bits < 1:
            raise UnsupportedError(
                f"codebooks of {', '.join(map(str, spec.stages))} entries, but AQLM's are all of "
                f"one power of two, from 2"
            )
        scheme = cls.from_config(
            {
                "num_codebooks": len(spec.stages),
                "nbits_per_codebook": bits,
                "out_group_size": spec.vector_width,
                "in_group_size": spec.vector_length,
            }
        )
        dtype: torch.dtype = getattr(torch, spec.codebook_dtype)
        if dtype not in FLOATS:
            raise UnsupportedError(f"codebooks in {spec.codebook_dtype}, but AQLM's are floats")
        theirs = scheme.spec(dtype)
        for field in dataclasses.fields(spec):
            mine, other = getattr(spec, field.name), getattr(theirs, field.name)
            if mine != other and field.name not in _WITHOUT_MEANING:
                raise UnsupportedError(f"{field.name} is {mine!r}, but an AQLM layer has {other!r}")
        if outline.n % spec.vector_width or outline.k % spec.vector_length:
            raise UnsupportedError(
                f"vectors of {spec.vector_text} don't divide {outline.n} x {outline.k}, and AQLM "
                f"pads nothing"
            )
        return scheme

    def spec(self, dtype: torch.dtype) -> CodebookSpec:
        """The format of a layer whose codebooks and scales are in `dtype`."""
        fields = {
            "method": "additive",
            "vector_length": self.in_group_size,
            "vector_width": self.out_group_size,
            "stages": (1 << self.nbits_per_codebook,) * self.num_codebooks,
            "scale_axis": "row",
            "codebook_dtype": str(dtype).removeprefix("torch."),
            "side_dtype": str(dtype).removeprefix("torch."),
        }
        return CodebookSpec.from_dict(fields)

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of stored codes."""
        return torch.int8 if self.nbits_per_codebook <= 8 else torch.int16

    def stored(self, outline: Outline) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a layer's tensors, by key under its module."""
        dtype: torch.dtype = getattr(torch, outline.spec.codebook_dtype)
        width, length = self.out_group_size, self.in_group_size
        rows, columns = outline.n // width, outline.k // length
        tensors = {
            "codes": ((rows, columns, self.num_codebooks), self.code_dtype),
            "codebooks": ((self.num_codebooks, 1 << self.nbits_per_codebook, width, length), dtype),
            "scales": ((rows, 1, 1, 1), dtype),
        }
        return tensors | ({"bias": ((outline.n,), dtype)} if outline.bias else {})
