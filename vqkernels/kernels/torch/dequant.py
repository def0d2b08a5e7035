"""dequant: decode the whole weight with one torch call, then one BLAS product.

What a user without a kernel would write: exact, portable, any device, and a dense copy of the
weight on every call. Codes are kept as int32 rows of one table, so that `embedding_bag` gathers
and sums the stages of a cell at once: `[rows * columns, stages] -> [rows * columns, d]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels.linear import (
    books_bytes,
    core_shape,
    pack_books,
    pack_sides,
    sides_bytes,
    surround,
)
from vqkernels.kernels.torch.indexing import entry_index, unsupported_activations
from vqkernels.parts import code_grid
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
    """int32 codes, fp32 codebooks, and the dense weight that each call makes."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    stages = len(spec.stages)
    weight = 4 * rows * columns * stages + books_bytes(problem) + sides_bytes(problem)
    dense = rows * columns * spec.vector_size
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    # along out, or with vectors of several rows, it is put in order once more
    copies = 1 if spec.vector_axis == "in" and spec.vector_width == 1 else 2
    bags = 24 * rows * columns  # embedding_bag's own offsets and sizes, int64 a cell each
    workspace = 4 * copies * dense + bags + 4 * problem.m * (width_x + 2 * width_y + 2 * problem.k)
    return Footprint(weight, workspace, problem.flops + dense * (stages - 1))


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """int32 table rows beside one table of all codebooks."""
    books = pack_books(tensor).flatten(0, 1).to(problem.torch_dtype)
    return Packed({"index": entry_index(tensor), "books": books} | pack_sides(tensor))


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """One gather and one product."""
    along_in = problem.spec.vector_axis == "in"
    width, length = problem.spec.vector_width, problem.spec.vector_length

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        rows, columns, stages = packed["index"].shape
        index = packed["index"].view(-1, stages)
        vectors = embedding_bag(index, packed["books"], mode="sum")
        if along_in:
            cells = vectors.view(rows, columns, width, length).transpose(1, 2)
            dense = cells.reshape(rows * width, columns * length).T
        else:
            cells = vectors.view(rows, columns, length)
            dense = cells.transpose(0, 1).reshape(columns, rows * length)
        if out.dtype == x.dtype:
            torch.mm(x, dense, out=out)
        else:  # y goes further in fp32; the BLAS gives x's dtype
            out.copy_(x @ dense)

    return surround(core, problem)


KERNEL = Kernel(
    name="dequant",
    op="linear",
    backend="torch",
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="decode the whole weight with one gather, then the BLAS",
    wide_vectors=True,
    rounds_weights=True,
    packs_anywhere=True,
)
