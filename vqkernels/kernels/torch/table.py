"""table: dot products of x with every entry by one einsum, then one gather-and-sum a row.

The plain torch form of the table method: `table: [columns, stages, entries, m]` in one product, in
fp32; then `embedding_bag` adds a row's looked-up words for all tokens at once. Codes are kept as
int32 rows of the table, 4 bytes a code.
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
from vqkernels.kernels.torch.indexing import unsupported_activations
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Space
from vqkernels.tensor import QuantizedTensor

SPACE = Space()


def supports(problem: Problem, device: Device) -> str | None:
    """Vectors along in, small codebooks, one set for all."""
    spec = problem.spec
    if spec.vector_axis == "out":
        return "vectors along out: each product belongs to one row, so no dot product is shared"
    if spec.max_entries > 256:
        return f"{spec.max_entries:,} entries: the tables would outweigh the dense weight"
    if spec.group_axis != "tensor" or spec.subspaces > 1:
        return "several codebook sets: torch/table multiplies by one; use numba/table"
    return unsupported_activations(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """There is nothing to choose."""
    return Config()


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """int32 codes and fp32 codebooks; a table of every entry for every column of cells."""
    spec, m = problem.spec, problem.m
    rows, columns = code_grid(spec, problem.n, problem.k)
    codes, tables = rows * columns * len(spec.stages), columns * sum(spec.stages)
    weight = 4 * codes + books_bytes(problem) + sides_bytes(problem)
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    workspace = 4 * m * (2 * tables + width_x + 3 * width_y + 2 * problem.k)
    return Footprint(weight, workspace, 2 * m * tables * spec.vector_length + m * codes)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """int32 rows of the table `[columns * entries of all stages]`."""
    spec = tensor.spec
    codes = tensor.parts["codes"].long()
    starts = torch.tensor([0, *spec.stages[:-1]], device=codes.device).cumsum(0)
    columns = torch.arange(codes.shape[1], device=codes.device)
    index = (codes + columns[:, None] * sum(spec.stages) + starts).int().flatten(1)
    return Packed({"index": index, "books": pack_books(tensor)[0]} | pack_sides(tensor))


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """One product and one gather."""
    length = problem.spec.vector_length

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        m = x.shape[0]
        x_cells = x.float().view(m, -1, length).permute(1, 2, 0)
        table = torch.matmul(packed["books"], x_cells)
        out.copy_(embedding_bag(packed["index"], table.view(-1, m), mode="sum").T)

    return surround(core, problem)


KERNEL = Kernel(
    name="table",
    op="linear",
    backend="torch",
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="dot-product tables by a batched product, summed by embedding_bag",
    packs_anywhere=True,
)
