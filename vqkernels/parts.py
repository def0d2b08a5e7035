"""The parts of a quantised matrix: names, shapes, dtypes and what each costs in bits.

One table serves the container (what must be in a file), the tensor (what is valid), the
synthetic weights (what to make) and the effective bits (what to count).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch

from vqkernels.errors import UnsupportedError
from vqkernels.spec import CodebookSpec, min_bits

__all__ = ["BitCount", "Part", "check_fit", "codebook_sets", "effective_bits", "part_table"]

Role = Literal["index", "codebook", "side", "bias"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One named tensor: `shape`, `dtype`, its `role`, and `bits` for all of it.

    `limit` is the number of entries that its codes select from (0: not codes).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    bits: int
    limit: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class BitCount:
    """Bits of a quantised matrix, or of several, by what they are spent on."""

    index: int = 0
    codebook: int = 0
    side: int = 0
    weights: int = 0

    def __add__(self, other: BitCount) -> BitCount:
        return BitCount(
            self.index + other.index,
            self.codebook + other.codebook,
            self.side + other.side,
            self.weights + other.weights,
        )

    def per_weight(self, *, side: bool = True) -> float:
        """Effective bits of a weight; without `side`, index and codebooks alone."""
        return (self.index + self.codebook + (self.side if side else 0)) / self.weights


def _floating(shape: tuple[int, ...], dtype: str, role: Role) -> Part:
    kind: torch.dtype = getattr(torch, dtype)
    return Part(shape, kind, role, math.prod(shape) * kind.itemsize * 8)


def _codes(shape: tuple[int, ...], entries: tuple[int, ...], bits: int) -> Part:
    limit = max(entries)
    dtype = torch.uint8 if limit <= 256 else torch.uint16
    return Part(shape, dtype, "index", bits, limit)


def code_grid(spec: CodebookSpec, n: int, k: int) -> tuple[int, int]:
    """Rows and columns of the codes of an `[n, k]` matrix (one cell holds all stages)."""
    main = k - spec.side_columns
    block = spec.vector_length * spec.stride
    if spec.vector_axis == "in":
        return math.ceil(n / spec.vector_width), math.ceil(main / block) * spec.stride
    return math.ceil(n / block) * spec.stride, main


def codebook_sets(spec: CodebookSpec, n: int, k: int) -> int:
    """Distinct codebook sets of an `[n, k]` matrix."""
    if spec.group_axis == "tensor":
        return 1
    features = n if spec.group_axis == "row" else k - spec.side_columns
    return math.ceil(features / spec.group_size)


def check_shape(spec: CodebookSpec, n: int, k: int) -> None:
    """Raise UnsupportedError where an `[n, k]` matrix can't be cut as the format says."""
    if n < 1 or k < 1:
        raise UnsupportedError(f"a {n} x {k} layer has no weights; both sides must be at least 1")
    if spec.side_columns >= k:
        raise UnsupportedError(
            f"{spec.side_columns} outlier and uniform columns leave nothing of {k} to quantise"
        )
    if spec.rotation_size and (k - spec.side_columns) % spec.rotation_size:
        raise UnsupportedError(
            f"a rotation of {spec.rotation_size} doesn't divide {k - spec.side_columns} columns"
        )


def check_fit(spec: CodebookSpec, n: int, k: int) -> None:
    """Raise UnsupportedError where an `[n, k]` matrix can't hold the format.

    A codebook with more entries than vectors to fill it would store more than it saves.
    """
    check_shape(spec, n, k)
    rows, columns = code_grid(spec, n, k)
    vectors = rows * columns // (codebook_sets(spec, n, k) * spec.subspaces)
    if vectors < spec.max_entries:
        raise UnsupportedError(
            f"{spec.max_entries:,} entries for {vectors:,} vectors a codebook "
            f"({n} x {k}, vectors of {spec.vector_text}); choose fewer entries or larger groups"
        )


def _side_parts(spec: CodebookSpec, n: int, k: int) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    sizes = {"tensor": 1, "row": n, "column": k}
    if spec.outlier_entries:
        shape = (math.ceil(n / spec.outlier_vector_length), spec.outlier_columns)
        bits = math.prod(shape) * min_bits(spec.outlier_entries)
        parts["outlier_codes"] = _codes(shape, (spec.outlier_entries,), bits)
        book = (spec.outlier_entries, spec.outlier_vector_length)
        parts["outlier_codebook"] = _floating(book, spec.side_dtype, "codebook")
    elif spec.outlier_columns:
        parts["outliers"] = _floating((n, spec.outlier_columns), spec.side_dtype, "side")
    if spec.uniform_columns:
        shape = (n, spec.uniform_columns)
        bits = math.prod(shape) * spec.uniform_bits
        parts["uniform_codes"] = _codes(shape, (1 << spec.uniform_bits,), bits)
        for name in ("uniform_scale", "uniform_zero"):
            parts[name] = _floating((spec.uniform_columns,), spec.side_dtype, "side")
    if spec.rotation_size:
        square = (spec.rotation_size, spec.rotation_size)
        parts["rotation"] = _floating(square, spec.side_dtype, "side")
    if spec.permuted:
        dtype = torch.uint16 if k <= 65536 else torch.int32
        parts["permutation"] = Part((k,), dtype, "side", k * dtype.itemsize * 8)
    for name, axis in (("scale", spec.scale_axis), ("zero", spec.zero_axis)):
        if axis != "none":
            parts[name] = _floating((sizes[axis],), spec.side_dtype, "side")
    return parts


def part_table(spec: CodebookSpec, n: int, k: int, *, bias: bool = False) -> dict[str, Part]:
    """The parts of an `[n, k]` matrix in `spec`, in the order of storage.

    `codes: [rows, columns, stages]`, `codebook_<s>: [sets, subspaces, entries, vector_size]`,
    `codebook_scale: [sets, subspaces, stages]` for int8 entries, and the sides that the spec
    asks for. `bias: [n]` belongs to the layer and is counted in no bits.
    """
    rows, columns = code_grid(spec, n, k)
    sets, size = codebook_sets(spec, n, k), spec.vector_size
    shape = (rows, columns, len(spec.stages))
    parts = {"codes": _codes(shape, spec.stages, rows * columns * spec.vector_bits)}
    for stage, entries in enumerate(spec.stages):
        book = (sets, spec.subspaces, entries, size)
        parts[f"codebook_{stage}"] = _floating(book, spec.codebook_dtype, "codebook")
    if spec.codebook_dtype == "int8":
        scales = (sets, spec.subspaces, len(spec.stages))
        parts["codebook_scale"] = _floating(scales, "float32", "codebook")
    parts |= _side_parts(spec, n, k)
    if bias:
        parts["bias"] = dataclasses.replace(_floating((n,), "float32", "bias"), bits=0)
    return parts


def effective_bits(layers: Iterable[tuple[CodebookSpec, int, int]]) -> BitCount:
    """Bits of the given `(spec, n, k)` layers together, in any number."""
    total = BitCount()
    for spec, n, k in layers:
        spent = dict.fromkeys(("index", "codebook", "side", "bias"), 0)
        for part in part_table(spec, n, k).values():
            spent[part.role] += part.bits
        total += BitCount(spent["index"], spent["codebook"], spent["side"], n * k)
    return total
