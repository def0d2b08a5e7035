"""The loop of `naive`, `vectorized` and `fused_rq`: few tokens, no tensor cores.

A program owns TILE_ROWS rows of codes, TOKENS tokens and a span of cells. It walks the span
TILE_CELLS at a time; every product has an accumulator of its own, `[TOKENS, TILE_ROWS,
TILE_CELLS, LENGTH]` fp32 spread over the threads, so that threads meet once, at the end. Spans are
summed by a second pass in a fixed order: no atomics, the same bits on every run.
"""

# mypy: ignore-errors
# device functions are typed by Triton, not by annotations

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Packed, Run
from vqkernels.kernels import layout
from vqkernels.kernels.linear import books_bytes, core_shape, sides_bytes, surround
from vqkernels.kernels.triton import counts, traits
from vqkernels.kernels.triton.decode import first_entry, load_entries, load_x, sum_entries
from vqkernels.kernels.triton.program import Program, pointer_dtypes, shared_bytes
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint
from vqkernels.tensor import QuantizedTensor
from vqkernels.work import Work

Programs = Callable[[Config, Problem], tuple[Program, ...]]


@triton.jit
def store_sums(
    sums, out, rows, token, M, WIDTH, ROWS, LENGTH: tl.constexpr, ALONG_IN: tl.constexpr,
):  # fmt: skip
    """Store the span's y: `sums: [TOKENS, TILE_ROWS, TILE_CELLS, LENGTH]` over cells."""
    at = (tl.program_id(2) * M + token).to(tl.int64) * WIDTH
    if ALONG_IN:
        y = tl.sum(tl.sum(sums, 3), 2)
        inside = (token < M)[:, None] & (rows < ROWS)[None, :]
        tl.store(out + at[:, None] + rows[None, :], y, mask=inside)
    else:
        y = tl.sum(sums, 2)
        output = rows[None, :, None] * LENGTH + tl.arange(0, LENGTH)[None, None, :]
        inside = (token < M)[:, None, None] & (rows < ROWS)[None, :, None]
        tl.store(out + at[:, None, None] + output, y, mask=inside)


@triton.jit
def gemv(
    x, codes, books, row_sets, column_sets, out,
    M, K, WIDTH, ROWS, COLUMNS, WORDS, SPAN,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
    ROW_SETS: tl.constexpr, COLUMN_SETS: tl.constexpr, ALONG_IN: tl.constexpr,
    FUSED: tl.constexpr,
    TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CELLS: tl.constexpr,
):  # fmt: skip
    """`out: [spans, M, WIDTH]`: the span's share of x times the decoded weight."""
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = rows[:, None]
    first = tl.program_id(2) * SPAN
    last = tl.minimum(first + SPAN, COLUMNS)
    sums = tl.zeros((TOKENS, TILE_ROWS, TILE_CELLS, LENGTH), tl.float32)
    for start in range(first, last, TILE_CELLS):
        cells = start + tl.arange(0, TILE_CELLS)
        cell = cells[None, :]
        values = load_x(x, token, cells, M, last, K, LENGTH, ALONG_IN)
        if FUSED:
            weight = sum_entries(
                codes, books, row_sets, column_sets, row, cell, ROWS, COLUMNS, WORDS,
                LAYOUT, BITS, ENTRIES, LENGTH, ROW_SETS, COLUMN_SETS,
            )  # fmt: skip
            # not weight[None], whose layout sends the tile through shared memory: 1 KB, not 4
            sums += tl.reshape(weight, (1, TILE_ROWS, TILE_CELLS, LENGTH)) * values[:, None]
        else:
            # x is used once a stage, and kept as the sums are laid out
            values = tl.reshape(values, (TOKENS, 1, TILE_CELLS, LENGTH if ALONG_IN else 1))
            inside = (row < ROWS) & (cell < COLUMNS)
            base = first_entry(
                row, cell, inside, row_sets, column_sets, ENTRIES, ROW_SETS, COLUMN_SETS
            )
            for stage in tl.static_range(len(ENTRIES)):
                weight = load_entries(
                    codes, books, base, row, cell, inside, stage, ROWS, COLUMNS, WORDS,
                    LAYOUT, BITS, ENTRIES, LENGTH,
                ).to(tl.float32)  # fmt: skip
                sums += tl.reshape(weight, (1, TILE_ROWS, TILE_CELLS, LENGTH)) * values
    store_sums(sums, out, rows, token, M, WIDTH, ROWS, LENGTH, ALONG_IN)


# Sums are fp32 registers: 64 a thread leave room for codes, entries and x within 255.
REGISTERS = Constraint(
    "at most 64 sums a thread of 8-element vectors",
    lambda c: (
        c.number("tokens") * c.number("tile_rows") * c.number("tile_cells") * 8
        <= 64 * 32 * c.number("warps")
    ),
)


def default(problem: Problem, device: Device) -> Config:
    """A wide step over few rows; enough spans to give every multiprocessor two programs."""
    rows, columns = code_grid(problem.spec, problem.n, problem.k)
    tokens = min(4, 1 << (problem.m - 1).bit_length())
    cells = next(c for c in (128, 64, 32, 16) if c * problem.spec.vector_length <= 512)
    tile_rows = {1: 8, 2: 4, 4: 2}[tokens]
    programs = -(-rows // tile_rows) * -(-problem.m // tokens)
    wanted = max(1, 2 * device.units // programs)
    splits = max(s for s in (1, 2, 4, 8, 16) if s <= wanted and (s == 1 or s * cells <= columns))
    return Config(
        layout="planes",
        tokens=tokens,
        splits=splits,
        tile_rows=tile_rows,
        tile_cells=cells,
        warps=4,
    )


def span_cells(config: Config, problem: Problem) -> int:
    """Cells of a span: whole tiles, as even as they come."""
    _, columns = code_grid(problem.spec, problem.n, problem.k)
    tile = config.number("tile_cells")
    tiles = -(-columns // tile)
    return -(-tiles // config.number("splits")) * tile


def spans(config: Config, problem: Problem) -> int:
    """Spans that have any cells."""
    _, columns = code_grid(problem.spec, problem.n, problem.k)
    return -(-columns // span_cells(config, problem))


def program(config: Config, problem: Problem, *, fused: bool) -> Program:
    """The product of one config."""
    code_layout = config.text("layout")
    width_x, width_y = core_shape(problem.spec, problem.n, problem.k)
    parts = spans(config, problem)
    sizes = layout.numbers(problem)
    tile_rows, tokens = config.number("tile_rows"), config.number("tokens")
    return Program(
        function=gemv,
        pointers=pointer_dtypes(
            x=problem.torch_dtype,
            codes=layout.code_dtype(problem, code_layout),
            books=layout.books_dtype(problem),
            row_sets=torch.int32,
            column_sets=torch.int32,
            out=torch.float32 if parts > 1 else problem.torch_dtype,
        ),
        numbers={**sizes, "K": width_x, "WIDTH": width_y, "SPAN": span_cells(config, problem)},
        constants={
            **traits.constants(problem, code_layout),
            "FUSED": fused,
            "TOKENS": tokens,
            "TILE_ROWS": tile_rows,
            "TILE_CELLS": config.number("tile_cells"),
        },
        grid=(-(-sizes["ROWS"] // tile_rows), -(-problem.m // tokens), parts),
        num_warps=config.number("warps"),
    )


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Codes in the config's layout."""
    return Packed(layout.arrays(tensor, config.text("layout"), problem))


def footprinter(programs: Programs) -> Callable[[Config, Problem, Device], Footprint]:
    """The `footprint` of a kernel file, from its one program."""

    def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
        """Codes, codebooks and sides; partial sums of the spans."""
        (product,) = programs(config, problem)
        weight = layout.codes_bytes(problem, config.text("layout")) + sides_bytes(problem)
        rows, columns = code_grid(problem.spec, problem.n, problem.k)
        weight += books_bytes(problem) + 4 * (rows + columns)
        width_x, width_y = core_shape(problem.spec, problem.n, problem.k)
        parts = product.grid[2]
        workspace = 4 * problem.m * (2 * width_x + (2 + (parts if parts > 1 else 0)) * width_y)
        return Footprint(weight, workspace, problem.flops, shared_bytes((product,), device))

    return footprint


def compiler(programs: Programs) -> Callable[[Config, Problem, Device], Run]:
    """The `compile` of a kernel file, from its one program."""

    def compile(config: Config, problem: Problem, device: Device) -> Run:
        (product,) = programs(config, problem)

        def core(packed: Packed, x: Tensor, out: Tensor) -> None:
            run_spans(product, packed, x, out)

        return surround(core, problem)

    return compile


def tile(program: Program) -> counts.Tile:
    """What a step of `program` decodes."""
    sizes = (int(program.constants[name]) for name in ("TILE_ROWS", "TILE_CELLS", "TOKENS"))
    return counts.Tile(*sizes, program.num_warps)


def worker(programs: Programs) -> Callable[[Config, Problem, Device], tuple[Work, ...]]:
    """The `work` of a kernel file whose one program is `gemv`."""

    def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
        (product,) = programs(config, problem)
        gather, shape = counts.global_gather(problem, product, device), tile(product)
        step = counts.gemv_step(problem, shape, gather, fused=product.constants["FUSED"])
        return counts.products(product, problem, device, shape, step, gather)

    return work


def run_spans(product: Program, packed: Packed, x: Tensor, out: Tensor) -> None:
    """Launch into `out`, or into partial sums that are then added in order."""
    given = {"x": x, **tensors(packed)}
    parts = product.grid[2]
    if parts == 1:
        product.launch({**given, "out": out})
        return
    partial = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    product.launch({**given, "out": partial})
    out.copy_(partial.sum(dim=0))


def tensors(packed: Packed) -> dict[str, Tensor]:
    """The packed arrays as arguments; set numbers that a format lacks are never read."""
    unused = dict.fromkeys(("row_sets", "column_sets"), packed["books"])
    return {**unused, **packed.arrays}
