"""A problem as the Triton kernels see it: what they don't take, and the spec as constants."""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernels.linear import set_axes
from vqkernels.problem import Problem

__all__ = ["constants", "unsupported"]


def unsupported(problem: Problem, device: Device) -> str | None:
    """The sentence that rules out what no Triton kernel takes, or None."""
    length, stages = problem.spec.vector_length, len(problem.spec.stages)
    if device.kind != "cuda":
        return f"Triton kernels run on a GPU, not on {device.name}"
    if length not in (4, 8, 16, 32):
        return f"vectors of {length}: Triton's tiles take 4, 8, 16 or 32"
    if stages > 4:
        return f"{stages} stages: the kernels unroll up to 4"
    return None


def constants(problem: Problem, layout: str) -> dict[str, object]:
    """The spec as constants of a kernel."""
    spec = problem.spec
    row_sets, column_sets = set_axes(spec)
    return {
        "LAYOUT": layout,
        "BITS": spec.code_bits,
        "ENTRIES": spec.stages,
        "LENGTH": spec.vector_length,
        "ROW_SETS": row_sets,
        "COLUMN_SETS": column_sets,
        "ALONG_IN": spec.vector_axis == "in",
    }
