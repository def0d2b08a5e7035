"""mma: decode a tile of the weight, then the tensor cores (`tl.dot`).

A program owns TILE_ROWS rows of codes and TOKENS tokens (16 at least: what an mma takes); each
step decodes `[TILE_ROWS, TILE_CELLS]` cells into an operand in x's dtype and multiplies with fp32
accumulation. `stage_sum`: `registers` sums the stages in fp32 and rounds the sum once to the
operand's dtype; `dots` multiplies stage by stage, exact entries, a dot each. Decoding costs the
same for 1 token as for TOKENS, so time is flat in m up to the tile.
"""

# mypy: ignore-errors
# device functions are typed by Triton, not by annotations

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.kernels import layout
from vqkernels.kernels.access import LANES, LINE
from vqkernels.kernels.triton import counts, gemv, traits
from vqkernels.kernels.triton.decode import first_entry, load_entries, sum_entries
from vqkernels.kernels.triton.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.work import Work

SPACE = Space(
    params=(
        Param("layout", layout.LAYOUTS, "order of the codes"),
        Param("tokens", (16, 32, 64, 128), "tokens a program"),
        Param("splits", (1, 2, 4, 8), "spans of k summed apart"),
        Param("tile_outputs", (32, 64, 128), "output features a program"),
        Param("tile_k", (32, 64, 128), "input features a step"),
        Param("stage_sum", ("registers", "dots"), "sum stages before or in the product"),
        Param("warps", (4, 8), "warps a program"),
        Param("stages", (1, 2, 3), "software pipeline depth"),
    ),
    constraints=(
        Constraint(
            "at most 64 sums a thread",
            lambda c: c.number("tokens") * c.number("tile_outputs") <= 64 * 32 * c.number("warps"),
        ),
        Constraint(
            "at most 128 decoded values a thread",
            lambda c: c.number("tile_k") * c.number("tile_outputs") <= 128 * 32 * c.number("warps"),
        ),
    ),
)


@triton.jit
def operand(weight, LENGTH: tl.constexpr, ALONG_IN: tl.constexpr, ROWS: tl.constexpr,
            CELLS: tl.constexpr):  # fmt: skip
    """A decoded tile `[ROWS, CELLS, LENGTH]` as `[input features, output features]`."""
    # one return: Triton types what follows a return too
    if ALONG_IN:
        tile = tl.trans(tl.reshape(weight, (ROWS, CELLS * LENGTH)))
    else:
        tile = tl.reshape(tl.permute(weight, (1, 0, 2)), (CELLS, ROWS * LENGTH))
    return tile


@triton.jit
def mma(
    x, codes, books, row_sets, column_sets, out,
    M, K, WIDTH, ROWS, COLUMNS, WORDS, SPAN,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, LENGTH: tl.constexpr,
    ROW_SETS: tl.constexpr, COLUMN_SETS: tl.constexpr, ALONG_IN: tl.constexpr,
    FUSED: tl.constexpr,
    TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CELLS: tl.constexpr,
):  # fmt: skip
    """`out: [spans, M, WIDTH]`: the span's share of x times the decoded weight."""
    FEATURES: tl.constexpr = TILE_CELLS * LENGTH if ALONG_IN else TILE_CELLS
    OUTPUTS: tl.constexpr = TILE_ROWS if ALONG_IN else TILE_ROWS * LENGTH
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = rows[:, None]
    first = tl.program_id(2) * SPAN
    last = tl.minimum(first + SPAN, COLUMNS)
    feature = tl.arange(0, FEATURES)
    end = last * (LENGTH if ALONG_IN else 1)
    at_x = x + token.to(tl.int64)[:, None] * K
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(first, last, TILE_CELLS):
        cell = (start + tl.arange(0, TILE_CELLS))[None, :]
        column = start * (LENGTH if ALONG_IN else 1) + feature
        inside_x = (token < M)[:, None] & (column < end)[None, :]
        values = tl.load(at_x + column[None, :], mask=inside_x, other=0.0)
        if FUSED:
            weight = sum_entries(
                codes, books, row_sets, column_sets, row, cell, ROWS, COLUMNS, WORDS,
                LAYOUT, BITS, ENTRIES, LENGTH, ROW_SETS, COLUMN_SETS,
            ).to(values.dtype)  # fmt: skip
            tile = operand(weight, LENGTH, ALONG_IN, TILE_ROWS, TILE_CELLS)
            sums = tl.dot(values, tile, sums, input_precision="ieee")
        else:
            inside = (row < ROWS) & (cell < COLUMNS)
            base = first_entry(
                row, cell, inside, row_sets, column_sets, ENTRIES, ROW_SETS, COLUMN_SETS
            )
            for stage in tl.static_range(len(ENTRIES)):
                weight = load_entries(
                    codes, books, base, row, cell, inside, stage, ROWS, COLUMNS, WORDS,
                    LAYOUT, BITS, ENTRIES, LENGTH,
                ).to(values.dtype)  # fmt: skip
                tile = operand(weight, LENGTH, ALONG_IN, TILE_ROWS, TILE_CELLS)
                sums = tl.dot(values, tile, sums, input_precision="ieee")
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    at = (tl.program_id(2) * M + token).to(tl.int64)[:, None] * WIDTH
    inside_out = (token < M)[:, None] & (output < WIDTH)[None, :]
    tl.store(out + at + output[None, :], sums, mask=inside_out)


def supports(problem: Problem, device: Device) -> str | None:
    """Half-precision activations, up to four stages."""
    if problem.dtype == "float32":
        return "float32 activations: tensor cores would round them to tf32"
    return traits.unsupported(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """The smallest token tile that holds m; spans until every multiprocessor has a program."""
    tokens = next((t for t in (16, 32, 64) if t >= problem.m), 64)
    tiles = -(-problem.n // 64) * -(-problem.m // tokens)
    splits = max(s for s in (1, 2, 4, 8) if s == 1 or s * tiles <= 2 * device.units)
    return Config(
        layout="planes",
        tokens=tokens,
        splits=splits,
        tile_outputs=64,
        tile_k=64,
        stage_sum="registers" if problem.dtype == "float16" else "dots",
        # with 4, what is decoded along out beside 64 tokens' sums spills on sm_86
        warps=8 if tokens == 64 and problem.spec.vector_axis == "out" else 4,
        stages=2,
    )


def _tiled(config: Config, problem: Problem) -> Config:
    """The config with its tile in rows of codes and cells, as `gemv` counts them."""
    length = problem.spec.vector_length
    along_in = problem.spec.vector_axis == "in"
    rows = config.number("tile_outputs") // (1 if along_in else length)
    cells = config.number("tile_k") // (length if along_in else 1)
    return Config(**dict(config), tile_rows=rows, tile_cells=cells)


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product."""
    fused = config.text("stage_sum") == "registers"
    plain = gemv.program(_tiled(config, problem), problem, fused=fused)
    return (plain.replace(function=mma, num_stages=config.number("stages")),)


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """A tile decoded into shared memory, and the tensor cores' product with every token's x."""
    (product,) = programs(config, problem)
    gather, tile = counts.global_gather(problem, product, device), gemv.tile(product)
    stages, length = len(problem.spec.stages), problem.spec.vector_length
    itemsize = problem.torch_dtype.itemsize
    features, outputs = config.number("tile_k"), config.number("tile_outputs")
    elements = tile.lanes * length
    dots = 1 if config.text("stage_sum") == "registers" else stages
    # an mma is 16 x 8 x 16, of two multiplications and additions each
    mmas = tile.tokens * outputs * features / 2048 / tile.warps
    # four warps' products of 64 rows are one instruction on Hopper
    by_group = tile.tokens >= 64 and device.arch == "sm_90"
    decoded = elements * LANES * itemsize / LINE
    step = counts.Step(
        60
        + max(1.0, tile.lanes) * stages * (5 + 2 * gather.pieces)
        + 2.4 * (stages - 1) * elements
        + (0 if by_group else 2 * dots * mmas),
        # entries through shared memory to their lanes, then as operands; x stored and loaded
        tile.lanes * stages * gather.wavefronts
        + 2 * stages * decoded
        + 2 * dots * decoded
        + 2 * tile.tokens * features * itemsize / LINE / tile.warps,
        48 + int(tile.tokens * outputs / (LANES * tile.warps) + elements / 2),
        shared_trips=4.0,
        tensor_flops=dots * mmas * 4096,
    )
    # x of every pipeline stage, and what the entries of each codebook pass through
    shared = features * itemsize * (config.number("stages") * tile.tokens + stages * outputs)
    return counts.products(product, problem, device, tile, step, gather, shared_bytes=shared)


KERNEL = Kernel(
    name="mma",
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
    about="decode a tile, then the tensor cores",
    rounds_weights=True,
)
