"""Hypothesis strategies: any format that CodebookSpec can express, with a small matrix for it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vqkernels.parts import code_grid, codebook_sets
from vqkernels.spec import CodebookSpec, min_bits
from vqkernels.tensor import QuantizedTensor, random_tensor

AXES = ("none", "tensor", "row", "column")
SIDE_DTYPES = ("float32", "float16", "bfloat16")


@st.composite
def fitting_specs(
    draw: st.DrawFn, *, max_side: int = 24, max_entries: int = 400
) -> tuple[CodebookSpec, int, int]:
    """`(spec, n, k)` with n and k of about `max_side` at most, such that the matrix fits."""
    fields: dict[str, Any] = {
        "vector_length": draw(st.integers(1, 8)),
        "vector_axis": draw(st.sampled_from(["in", "out"])),
        "stride": draw(st.integers(1, 3)),
        "method": draw(st.sampled_from(["vq", "pq", "opq", "rq", "additive", "vptq"])),
        "codebook_dtype": draw(st.sampled_from([*SIDE_DTYPES, "int8"])),
        "side_dtype": draw(st.sampled_from(SIDE_DTYPES)),
        "distance": draw(st.sampled_from(["l2", "cosine"])),
        "traversal": draw(st.sampled_from(["row", "column"])),
        "scale_axis": draw(st.sampled_from(AXES)),
        "zero_axis": draw(st.sampled_from(AXES)),
        "permuted": draw(st.booleans()),
        **draw(_sides()),
    }
    if fields["vector_axis"] == "in":
        fields["vector_width"] = draw(st.sampled_from([1, 1, 2, 3]))
    n, main = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    if draw(st.booleans()):
        rotation = fields["rotation_size"] = draw(st.integers(1, 6))
        main = rotation * draw(st.integers(1, max(1, max_side // rotation)))
    k = main + fields.get("outlier_columns", 0) + fields.get("uniform_columns", 0)
    fields |= draw(_sharing(fields))
    vectors = _vectors_per_codebook(fields, n, k)
    if not vectors:  # more codebooks than vectors: share one
        fields |= {"subspaces": 1, "group_axis": "tensor", "group_size": 0}
        vectors = _vectors_per_codebook(fields, n, k)
    fields |= draw(_stages(min(vectors, max_entries)))
    return CodebookSpec(**fields), n, k


@st.composite
def quantized_tensors(draw: st.DrawFn, **limits: int) -> QuantizedTensor:
    """A random tensor in a random format; `limits` are those of `fitting_specs`."""
    spec, n, k = draw(fitting_specs(**limits))
    return random_tensor(spec, n, k, seed=draw(st.integers(0, 999)), bias=draw(st.booleans()))


@st.composite
def _sides(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    outliers = draw(st.sampled_from(["none", "dense", "codebook"]))
    if outliers != "none":
        fields["outlier_columns"] = draw(st.integers(1, 3))
    if outliers == "codebook":
        fields["outlier_entries"] = draw(st.integers(1, 300))
        fields["outlier_vector_length"] = draw(st.integers(1, 5))
    if draw(st.booleans()):
        fields["uniform_columns"] = draw(st.integers(1, 3))
        fields["uniform_bits"] = draw(st.integers(1, 8))
    return fields


@st.composite
def _sharing(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Subspaces and groups: which vectors share a codebook."""
    axis = draw(st.sampled_from(["tensor", "row", "column"]))
    shared: dict[str, Any] = {"subspaces": draw(st.integers(1, 3)), "group_axis": axis}
    if axis != "tensor":
        along = {"in": "column", "out": "row"}[fields["vector_axis"]]
        across = fields.get("vector_width", 1) if axis == "row" else 1
        block = fields["vector_length"] * fields["stride"] if axis == along else across
        shared["group_size"] = block * draw(st.integers(1, 6))
    return shared


@st.composite
def _stages(draw: st.DrawFn, top: int) -> dict[str, Any]:
    """1 to 4 stages of up to `top` entries, code widths and factors."""
    sizes = st.one_of(st.integers(1, top), st.just(top))
    fields: dict[str, Any] = {"stages": tuple(draw(st.lists(sizes, min_size=1, max_size=4)))}
    if draw(st.booleans()):
        fields["code_bits"] = tuple(draw(st.integers(min_bits(e), 16)) for e in fields["stages"])
    if draw(st.booleans()):
        factors = st.floats(-4, 4, allow_subnormal=False)
        fields["coefficients"] = tuple(draw(factors) for _ in fields["stages"])
    return fields


def _vectors_per_codebook(fields: dict[str, Any], n: int, k: int) -> int:
    spec = CodebookSpec(stages=(1,), **fields)
    rows, columns = code_grid(spec, n, k)
    return rows * columns // (codebook_sets(spec, n, k) * spec.subspaces)
