"""staged: codebooks loaded once into the program, then gathered from on chip.

The codebook of every stage is a tile of the program, `[entries, vector_length]`, and `tl.gather`
takes the entries of a `[TILE_ROWS * TILE_CELLS]` tile of codes from it. What `tl.gather` becomes is
Triton's choice: shuffles where the gathered axis lies within a warp, else a round trip through
shared memory (`vqbench compile triton/staged` shows the shared bytes of a config).

Codes in any layout; one codebook set; entries padded to a power of two.
"""

# mypy: ignore-errors
# device functions are typed by Triton, not by annotations

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.kernels import gathers, layout
from vqkernels.kernels.triton import counts, gemv, traits
from vqkernels.kernels.triton.decode import load_code, load_x, sum_first
from vqkernels.kernels.triton.gemv import store_sums
from vqkernels.kernels.triton.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.work import Work

MOST_VALUES = 4096  # of a codebook on chip: 32 registers a thread of a 4-warp program in fp32

SPACE = Space(
    params=(
        Param("layout", layout.LAYOUTS, "order of the codes"),
        Param("tokens", (1, 2, 4), "tokens that share a decode"),
        Param("splits", (1, 2, 4, 8, 16), "spans of k summed apart"),
        Param("tile_rows", (2, 4, 8, 16), "rows of codes a program"),
        Param("tile_cells", (16, 32, 64), "cells a step"),
        Param("warps", (4, 8), "warps a program"),
    ),
    constraints=(gemv.REGISTERS,),
)


@triton.jit
def staged(
    x, codes, books, out,
    M, K, WIDTH, ROWS, COLUMNS, WORDS, SPAN,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
    ALONG_IN: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CELLS: tl.constexpr,
):  # fmt: skip
    """`out: [spans, M, WIDTH]`, as `gemv.gemv`, with entries gathered from tiles."""
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(2) * SPAN
    last = tl.minimum(first + SPAN, COLUMNS)
    element = tl.arange(0, LENGTH)
    sums = tl.zeros((TOKENS, TILE_ROWS, TILE_CELLS, LENGTH), tl.float32)
    for stage in tl.static_range(len(ENTRIES)):
        entry = tl.arange(0, PADDED)
        known = entry < ENTRIES[stage]
        at_book = (sum_first(ENTRIES, stage) + entry)[:, None] * LENGTH + element[None, :]
        book = tl.load(books + at_book, mask=known[:, None], other=0.0)
        for start in range(first, last, TILE_CELLS):
            cells = start + tl.arange(0, TILE_CELLS)
            row, cell = rows[:, None], cells[None, :]
            inside = (row < ROWS) & (cell < COLUMNS)
            code = load_code(codes, row, cell, inside, stage, ROWS, COLUMNS, WORDS, LAYOUT, BITS)
            code = tl.reshape(code, (TILE_ROWS * TILE_CELLS, 1))
            index = tl.broadcast_to(code, (TILE_ROWS * TILE_CELLS, LENGTH))
            weight = tl.reshape(tl.gather(book, index, 0), (TILE_ROWS, TILE_CELLS, LENGTH))
            values = load_x(x, token, cells, M, last, K, LENGTH, ALONG_IN)
            sums += weight.to(tl.float32)[None] * values[:, None]
    store_sums(sums, out, rows, token, M, WIDTH, ROWS, LENGTH, ALONG_IN)


def _padded(problem: Problem) -> int:
    return max(16, 1 << (problem.spec.max_entries - 1).bit_length())


def supports(problem: Problem, device: Device) -> str | None:
    """Codebooks that fit the registers, one set for all."""
    spec = problem.spec
    if spec.group_axis != "tensor" or spec.subspaces > 1:
        return "several codebook sets: triton/staged holds one on chip; use triton/vectorized"
    if _padded(problem) * spec.vector_length > MOST_VALUES:
        return (
            f"{spec.max_entries:,} entries of {spec.vector_length}: more than the {MOST_VALUES:,} "
            f"values that triton/staged holds on chip"
        )
    return traits.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """The gather loop's, with steps that leave registers for the codebook."""
    config = gemv.default(problem, device)
    return config.replace(tile_cells=min(64, config.number("tile_cells")))


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product."""
    plain = gemv.program(config, problem, fused=False)
    drop = ("ROW_SETS", "COLUMN_SETS", "FUSED")
    constants = {name: value for name, value in plain.constants.items() if name not in drop}
    pointers = {n: d for n, d in plain.pointers.items() if not n.endswith("_sets")}
    return (
        plain.replace(
            function=staged,
            pointers=pointers,
            constants={**constants, "PADDED": _padded(problem)},
        ),
    )


# Instructions of a step, and of an element for each 32 entries that it may lie among: a shuffle and
# a choice, or less where one choice serves several.
_STEP, _AMONG = 260, 1.9


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """Every stage walks the span; an element is searched among the registers of a warp."""
    (product,) = programs(config, problem)
    length, stages = problem.spec.vector_length, len(problem.spec.stages)
    tile = gemv.tile(product)
    gather = gathers.Gather(0, 0.0, 0.0, 10.0, held_bytes=gathers.packed_books(problem))
    elements = tile.lanes * length
    among = elements * _padded(problem) / 32
    inputs = length if problem.spec.vector_axis == "in" else 1
    step = counts.Step(
        _STEP + _AMONG * among + elements * (2 + tile.tokens) + tile.tokens * inputs,
        # a shuffle takes the way of an access
        among + 4 * tile.lanes * length / 8 + tile.tokens * max(1.0, tile.cells * inputs / 64),
        48 + int(elements * (tile.tokens + 1)),
        shared_trips=4.0,
    )
    return counts.products(product, problem, device, tile, step, gather, turns=stages)


KERNEL = Kernel(
    name="staged",
    op="linear",
    backend="triton",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=gemv.footprinter(programs),
    pack=gemv.pack,
    compile=gemv.compiler(programs),
    programs=programs,
    work=work,
    about="codebooks on chip, gathered there",
)
