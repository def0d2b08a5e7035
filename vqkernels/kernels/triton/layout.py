"""The host half of the Triton kernels: weights laid out, and what every kernel asks alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels.device import Device
from vqkernels.kernels.linear import pack_books, pack_sets, pack_sides, set_axes
from vqkernels.packing import pack_codes, packed_words
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "LAYOUTS",
    "arrays",
    "books_dtype",
    "code_bits",
    "code_dtype",
    "codes_bytes",
    "constants",
    "numbers",
    "row_words",
    "triton_dtype",
    "unsupported",
]

LAYOUTS = ("cells", "planes", "columns", "packed")  # what `decode` reads; `words`: `vectorized`

_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.uint16: "u16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def triton_dtype(dtype: torch.dtype) -> str:
    """Triton's name of a torch dtype."""
    return _NAMES[dtype]


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


def code_bits(problem: Problem) -> int:
    """Bits of a code in every layout but `packed`."""
    return 8 if problem.spec.max_entries <= 256 else 16


def code_dtype(problem: Problem, layout: str) -> torch.dtype:
    """dtype of the packed codes in a layout."""
    if layout in ("packed", "words"):
        return torch.int32
    return torch.uint8 if code_bits(problem) == 8 else torch.uint16


def row_words(problem: Problem) -> int:
    """int32 words of a stage's row of codes in `words`: whole loads of 16 bytes."""
    _, columns = code_grid(problem.spec, problem.n, problem.k)
    return -(-columns * code_bits(problem) // 128) * 4


def books_dtype(problem: Problem) -> torch.dtype:
    """dtype of the packed codebooks: x's where that holds every entry as it is, else fp32."""
    spec = problem.spec
    exact = spec.codebook_dtype == problem.dtype and not spec.coefficients
    return problem.torch_dtype if exact else torch.float32


def codes_bytes(problem: Problem, layout: str) -> int:
    """Bytes of the packed codes in a layout."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    if layout == "packed":
        return 4 * rows * packed_words(columns, spec.code_bits)
    if layout == "words":
        return 4 * rows * len(spec.stages) * row_words(problem)
    return rows * columns * len(spec.stages) * code_dtype(problem, layout).itemsize


def arrays(tensor: QuantizedTensor, layout: str, problem: Problem) -> dict[str, Tensor]:
    """Codes in `layout`, codebooks, set numbers and sides."""
    codes = tensor.parts["codes"]
    if layout == "packed":
        packed = pack_codes(codes, tensor.spec.code_bits)
    elif layout == "planes":
        packed = codes.permute(2, 0, 1).contiguous()
    elif layout == "columns":
        packed = codes.permute(2, 1, 0).contiguous()
    elif layout == "words":
        padding = 32 // code_bits(problem) * row_words(problem) - codes.shape[1]
        rows = functional.pad(codes.permute(2, 0, 1), (0, padding))
        packed = rows.contiguous().view(torch.int32)
    else:
        packed = codes.contiguous()
    sets = {name: values.int() for name, values in pack_sets(tensor).items()}
    books = pack_books(tensor).to(books_dtype(problem))
    return {"codes": packed, "books": books} | sets | pack_sides(tensor)


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


def numbers(problem: Problem) -> dict[str, int]:
    """The sizes that every kernel takes."""
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    return {
        "M": problem.m,
        "ROWS": rows,
        "COLUMNS": columns,
        "WORDS": packed_words(columns, problem.spec.code_bits),
    }
