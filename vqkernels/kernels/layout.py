"""Codes and codebooks as GPU kernels read them: the layouts, their dtypes and sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels.kernels.linear import pack_books, pack_sets, pack_sides, share_books
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
    "numbers",
    "row_words",
]

# Order of the codes, what a kernel can read one by one:
#   cells     [rows, columns, stages]   as stored: the stages of a cell side by side
#   planes    [stages, rows, columns]   a stage's codes of a row side by side: wide loads
#   columns   [stages, columns, rows]   a stage's codes of a column side by side
#   packed    [rows, words]             a bitstream a row: no bit more than the format's
# and, read by the word, `words` [stages, rows, words]: planes with rows padded to 16 bytes.
LAYOUTS = ("cells", "planes", "columns", "packed")


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


def arrays(
    tensor: QuantizedTensor, layout: str, problem: Problem, *, shared: bool = True
) -> dict[str, Tensor]:
    """Codes in `layout`, codebooks, set numbers and sides.

    shared: equal codebook sets are packed once; False for a kernel that counts on all of them.
    """
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
        # flat: of an axis of one, torch keeps strides that no wider dtype divides
        words = rows.contiguous().flatten().view(torch.int32)
        packed = words.view(rows.shape[0], rows.shape[1], -1)
    else:
        packed = codes.contiguous()
    books, sets = pack_books(tensor), pack_sets(tensor)
    if shared:
        books, sets = share_books(tensor.spec, books, sets)
    narrow = {name: values.int() for name, values in sets.items()}
    sides = pack_sides(tensor)
    return {"codes": packed, "books": books.to(books_dtype(problem))} | narrow | sides


def numbers(problem: Problem) -> dict[str, int]:
    """The sizes that every kernel takes."""
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    return {
        "M": problem.m,
        "ROWS": rows,
        "COLUMNS": columns,
        "WORDS": packed_words(columns, problem.spec.code_bits),
    }
