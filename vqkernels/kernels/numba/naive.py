"""naive: one lookup at a time from the canonical codes, for any spec; the yardstick of the rest.

codes: `[rows, columns, stages]` as stored, uint8 or uint16. A thread owns rows of codes; for each
cell it adds up the stages' entries and multiplies. No layout, no explicit SIMD, no tuning.
"""

# mypy: ignore-errors
# device functions are typed by numba's inference, not by annotations

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels import linear
from vqkernels.kernels.linear import pack_books, pack_sets, pack_sides, surround
from vqkernels.kernels.numba import cells, threads  # noqa: F401  (threads settles the pool)
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Space
from vqkernels.tensor import QuantizedTensor

SPACE = Space()


def supports(problem: Problem, device: Device) -> str | None:
    """Any spec, fp32."""
    return cells.unsupported_activations(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """There is nothing to choose."""
    return Config()


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Codes as stored, fp32 codebooks; every product done."""
    spec = problem.spec
    rows, columns = code_grid(spec, problem.n, problem.k)
    code_bytes = 1 if spec.max_entries <= 256 else 2
    codes = rows * columns * (len(spec.stages) * code_bytes)
    sets = 8 * (rows + columns)
    weight = codes + linear.books_bytes(problem) + linear.sides_bytes(problem) + sets
    return Footprint(
        weight_bytes=weight, workspace_bytes=problem.activation_bytes, flops=problem.flops
    )


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """The canonical codes beside fp32 codebooks."""
    spec = tensor.spec
    rows, columns = code_grid(spec, tensor.n, tensor.k)
    arrays = {"codes": tensor.parts["codes"].contiguous(), "books": pack_books(tensor)}
    sets = pack_sets(tensor)
    arrays["row_sets"] = sets.get("row_sets", torch.zeros(rows, dtype=torch.int64))
    arrays["column_sets"] = sets.get("column_sets", torch.zeros(columns, dtype=torch.int64))
    return Packed(arrays | pack_sides(tensor))


@njit(parallel=True, cache=True)
def _along_in(codes, books, row_sets, column_sets, starts, x, out):
    rows, columns, stages = codes.shape
    width, length = out.shape[1] // rows, x.shape[1] // columns
    for row in prange(rows):
        for token in range(x.shape[0]):
            for across in range(width):
                total = np.float32(0)
                for column in range(columns):
                    book = row_sets[row] + column_sets[column]
                    for along in range(length):
                        element = across * length + along
                        weight = np.float32(0)
                        for stage in range(stages):
                            code = starts[stage] + codes[row, column, stage]
                            weight += books[book, code, element]
                        total += x[token, column * length + along] * weight
                out[token, row * width + across] = total


@njit(parallel=True, cache=True)
def _along_out(codes, books, row_sets, column_sets, starts, x, out):
    rows, columns, stages = codes.shape
    length = books.shape[2]
    for row in prange(rows):
        for token in range(x.shape[0]):
            for element in range(length):
                total = np.float32(0)
                for column in range(columns):
                    book = row_sets[row] + column_sets[column]
                    weight = np.float32(0)
                    for stage in range(stages):
                        weight += books[book, starts[stage] + codes[row, column, stage], element]
                    total += x[token, column] * weight
                out[token, row * length + element] = total


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """One of two loops, by the vectors' axis."""
    spec = problem.spec
    starts = np.cumsum([0, *spec.stages[:-1]]).astype(np.int64)
    kernel = _along_in if spec.vector_axis == "in" else _along_out

    def core(packed: Packed, x: Tensor, out: Tensor) -> None:
        names = ("codes", "books", "row_sets", "column_sets")
        kernel(*(packed[name].numpy() for name in names), starts, x.numpy(), out.numpy())

    return surround(core, problem)


KERNEL = Kernel(
    name="naive",
    op="linear",
    backend="numba",
    runs_on=("cpu",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="one lookup at a time, any spec",
    wide_vectors=True,
)
