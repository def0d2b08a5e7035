"""CodebookSpec: what a codebook format is, apart from any matrix that uses it.

A weight `W[n, k]` (n output features, k input features) is stored as

    W[:, perm] = [outliers | uniform | main @ rotation]      then  W = scale * W + zero

where `main` is cut into vectors of `vector_length` along `vector_axis`, `vector_width` rows across
it, and each vector is the sum over stages of `coefficient * codebook[stage][code]`. Every part but
the codes is optional.
VQ, PQ, OPQ, RQ, AQLM and VPTQ are values of this one type.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_type_hints

from vqkernels.errors import SpecError

__all__ = ["SPEC_VERSION", "Axis", "CodebookSpec", "ScaleAxis"]

SPEC_VERSION = 2  # 1 had no vector_width

Method = Literal["vq", "pq", "opq", "rq", "additive", "vptq"]
Axis = Literal["in", "out"]
GroupAxis = Literal["tensor", "row", "column"]
ScaleAxis = Literal["none", "tensor", "row", "column"]
CodebookDtype = Literal["float32", "float16", "bfloat16", "int8"]
SideDtype = Literal["float32", "float16", "bfloat16"]

MAX_ENTRIES = 65536  # a code is at most 16 bits, in every format of the field


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """A codebook format.

    vector_length: elements of a vector along its axis; all of them where `vector_width` is 1.
    stages: entries of each residual or additive codebook; one stage is plain VQ.
    vector_axis: vectors run along input features (`in`, as AQLM) or output features
        (`out`, as VPTQ).
    vector_width: output features that one vector covers (AQLM's out_group_size), for vectors along
        `in` only. An entry is `[vector_width, vector_length]` then, stored row after row.
    method: how the codes were found; decoding doesn't depend on it.
    subspaces: PQ: vector number p along the vector axis uses codebook `p % subspaces`.
    group_axis, group_size: one codebook set for the tensor, or one for every `group_size`
        output features (`row`; 1 is per-channel, the head size is per-head) or main input
        features (`column`, as VPTQ's groups).
    coefficients: factor of each stage; empty means 1.
    code_bits: stored bits of each code; empty means the fewest that hold the stage.
    codebook_dtype: `int8` entries carry one fp32 scale a stage, set and subspace.
    distance: what the quantizer minimised.
    traversal: order of the codes in a stored bitstream: rows of codes, or columns.
    stride: neighbours in a vector lie this many elements apart along the vector axis.
    scale_axis, zero_axis: `W = scale * W + zero`, per tensor, output row or input column;
        zero is in units of the weight (VPTQ's weight_bias).
    side_dtype: dtype of scales, zeros, rotation and dense outliers.
    rotation_size: side of the square block R that each run of so many main columns is multiplied
        by (0: none). The quantizer's is orthogonal, or the root of a covariance; any will decode.
    permuted: a permutation of the input features is stored. Without one, side columns are the
        weight's leading ones.
    outlier_columns: leading stored columns kept out of the codebooks: dense in `side_dtype`,
        or, with `outlier_entries` and `outlier_vector_length` (along output features), by a
        codebook of their own.
    uniform_columns, uniform_bits: the next stored columns, quantised uniformly, with a scale
        and a zero a column.

    Raises SpecError, one line, where the fields contradict each other.
    """

    vector_length: int
    stages: tuple[int, ...]
    vector_axis: Axis = "in"
    vector_width: int = 1
    method: Method = "vq"
    subspaces: int = 1
    group_axis: GroupAxis = "tensor"
    group_size: int = 0
    coefficients: tuple[float, ...] = ()
    code_bits: tuple[int, ...] = ()
    codebook_dtype: CodebookDtype = "float16"
    distance: Literal["l2", "cosine"] = "l2"
    traversal: Literal["row", "column"] = "row"
    stride: int = 1
    scale_axis: ScaleAxis = "none"
    zero_axis: ScaleAxis = "none"
    side_dtype: SideDtype = "float16"
    rotation_size: int = 0
    permuted: bool = False
    outlier_columns: int = 0
    outlier_entries: int = 0
    outlier_vector_length: int = 0
    uniform_columns: int = 0
    uniform_bits: int = 8

    def __post_init__(self) -> None:
        _check_lists(self)
        for name in ("stages", "coefficients", "code_bits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        bits = self.code_bits or tuple(min_bits(e) for e in self.stages)
        object.__setattr__(self, "code_bits", bits)
        _check_types(self)
        _check_stages(self)
        _check_width(self)
        _check_groups(self)
        _check_sides(self)

    @property
    def side_columns(self) -> int:
        """Input features that bypass the main codebooks."""
        return self.outlier_columns + self.uniform_columns

    @property
    def vector_size(self) -> int:
        """Elements of one codebook entry."""
        return self.vector_width * self.vector_length

    @property
    def vector_text(self) -> str:
        """What a vector covers, as messages write it: `8`, or `2x8` for two rows of eight."""
        wide = self.vector_width > 1
        return f"{self.vector_width}x{self.vector_length}" if wide else f"{self.vector_length}"

    @property
    def max_entries(self) -> int:
        """Entries of the largest stage."""
        return max(self.stages)

    @property
    def vector_bits(self) -> int:
        """Bits of all codes of one vector."""
        return sum(self.code_bits)

    def coefficient(self, stage: int) -> float:
        """Factor of `stage`."""
        return self.coefficients[stage] if self.coefficients else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` is the inverse.

        A vector_width of 1 is left out: one format has one text, whichever version wrote it, and
        stores and baselines are searched by it.
        """
        fields = {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        if self.vector_width == 1:
            del fields["vector_width"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CodebookSpec:
        """A spec from `to_dict`'s output or a TOML table; unknown fields are a SpecError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise SpecError(f"format: unknown field {unknown[0]!r}; known: {', '.join(known)}")
        if missing := {"vector_length", "stages"} - set(fields):
            raise SpecError(f"format: field {min(missing)!r} is missing; add it")
        return cls(**fields)


def min_bits(entries: int) -> int:
    """The fewest bits that hold a code below `entries`; a lone entry still takes one."""
    return max(1, math.ceil(math.log2(entries))) if entries > 0 else 0


def _check_lists(spec: CodebookSpec) -> None:
    for name, kinds in (("stages", int), ("code_bits", int), ("coefficients", int | float)):
        value = getattr(spec, name)
        # True is an int to Python
        if not isinstance(value, list | tuple) or not all(
            isinstance(number, kinds) and not isinstance(number, bool) for number in value
        ):
            raise SpecError(f"format: {name} must be a list of numbers, not {value!r}")


def _check_types(spec: CodebookSpec) -> None:
    hints = get_type_hints(CodebookSpec)
    for field in dataclasses.fields(spec):
        value, hint = getattr(spec, field.name), hints[field.name]
        choices = get_args(hint)
        if hint is int and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise SpecError(f"format: {field.name} must be a whole number >= 0, not {value!r}")
        if hint is bool and not isinstance(value, bool):
            raise SpecError(f"format: {field.name} must be true or false, not {value!r}")
        if choices and isinstance(choices[0], str) and value not in choices:
            raise SpecError(f"format: {field.name} {value!r} is not one of {', '.join(choices)}")


def _check_stages(spec: CodebookSpec) -> None:
    if spec.vector_length < 1 or spec.stride < 1 or spec.subspaces < 1:
        raise SpecError("format: vector_length, stride and subspaces must be at least 1")
    if not spec.stages:
        raise SpecError("format: stages is empty; name the entries of one codebook at least")
    for entries in spec.stages:
        if not 1 <= entries <= MAX_ENTRIES:
            raise SpecError(f"format: a stage of {entries!r} entries; use 1 to {MAX_ENTRIES}")
    if len(spec.code_bits) != len(spec.stages):
        raise SpecError("format: code_bits must give one number for each stage")
    for entries, bits in zip(spec.stages, spec.code_bits, strict=True):
        if not min_bits(entries) <= bits <= 16:
            raise SpecError(
                f"format: {bits!r}-bit codes for {entries} entries; use {min_bits(entries)} to 16"
            )
    if spec.coefficients and len(spec.coefficients) != len(spec.stages):
        raise SpecError("format: coefficients must give one number for each stage")
    if not all(math.isfinite(c) for c in spec.coefficients):
        raise SpecError("format: coefficients must be finite numbers")


def _check_groups(spec: CodebookSpec) -> None:
    if (spec.group_axis == "tensor") != (spec.group_size == 0):
        raise SpecError("format: group_size goes with group_axis row or column, and only there")
    along = {"in": "column", "out": "row"}[spec.vector_axis]
    block = spec.vector_length * spec.stride
    if spec.group_axis == along and spec.group_size % block:
        raise SpecError(
            f"format: group_size {spec.group_size} cuts vectors of {block} in two; "
            f"use a multiple of {block}"
        )


def _check_width(spec: CodebookSpec) -> None:
    width = spec.vector_width
    if width < 1 or (width > 1 and spec.vector_axis == "out"):
        raise SpecError(
            f"format: vector_width {width} along {spec.vector_axis}; it counts the output features "
            f"across vectors along in, and is 1 along out, where vector_length counts them"
        )
    if spec.group_axis == "row" and spec.group_size % width:
        raise SpecError(
            f"format: group_size {spec.group_size} cuts vectors of {width} rows in two; "
            f"use a multiple of {width}"
        )


def _check_sides(spec: CodebookSpec) -> None:
    if (spec.outlier_entries > 0) != (spec.outlier_vector_length > 0):
        raise SpecError("format: outlier_entries and outlier_vector_length go together")
    if spec.outlier_entries and not spec.outlier_columns:
        raise SpecError("format: an outlier codebook without outlier_columns; set both")
    if spec.outlier_entries > MAX_ENTRIES:
        raise SpecError(f"format: {spec.outlier_entries} outlier entries; use up to {MAX_ENTRIES}")
    if not 1 <= spec.uniform_bits <= 8:
        raise SpecError(f"format: uniform_bits {spec.uniform_bits}; use 1 to 8")
