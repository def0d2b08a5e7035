"""table: each code is one lookup in a table of its entry's products with x, built beforehand.

Where a gather of a whole entry moves 16 bytes of shared memory a code (8 weights in fp16) and meets
others in the banks, a looked-up word is 4 bytes for 1 or 2 tokens and 8 for 4, and no two lanes
ever meet; tensor cores add the words up. Words are fp16: x is scaled to their range by a power of
two a token, entries by one that `scales` holds. More than `tokens` tokens are passes over codes.

A block holds `32 * blocks * warps` rows and builds the tables for them alone: more rows a block are
fewer builds, more splits of k more blocks. A GPU before sm_90 takes `split=cluster` for workspace,
and codes through registers whatever `ring` says.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels.cuda import around, product
from vqkernels.kernels.cuda import table_shape as shape
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.cuda.table_work import work
from vqkernels.kernels.linear import (
    core_shape,
    pack_books,
    pack_sets,
    share_books,
    sides_bytes,
)
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.tensor import QuantizedTensor

SPACE = Space(
    params=(
        Param("tokens", (1, 2, 4), "tokens that share a lookup"),
        Param("warps", (4, 8, 14, 16), "warps a block"),
        Param("blocks", (1, 2, 4), "blocks of 32 rows a warp"),
        Param("build", ("mma", "fma"), "what fills tables: tensor cores where they can, or FMAs"),
        Param("regions", (1, 2, 3), "64 KB regions of tables at once; further stages are passes"),
        Param("split", ("cluster", "workspace"), "where spans of k are added up"),
        Param("splits", (1, 2, 4, 8, 16), "spans of k summed apart"),
        Param("ring", (0, 2, 3, 4, 6), "slots of a warp's ring of codes; 0: registers"),
        Param("ahead", (0, 4, 8), "KB of codes a warp asks L2 for, before registers take them"),
        Param("dependent", (False, True), "begin before the launch ahead has ended"),
    ),
    constraints=(
        # 8 sums a token and block of rows, in fp32, of 128 registers with 16 warps
        Constraint(
            "at most 64 sums a thread",
            lambda c: c.number("blocks") * c.number("tokens") <= 8,
        ),
        Constraint(
            "clusters of 2 to 8 blocks",
            lambda c: c.text("split") == "workspace" or 2 <= c.number("splits") <= 8,
        ),
        Constraint(
            "a ring asks for codes itself",
            lambda c: c.number("ring") == 0 or c.number("ahead") == 0,
        ),
    ),
)


def supports(problem: Problem, device: Device) -> str | None:
    """Vectors of even length along k, byte codes, 16-bit activations, sets of whole row blocks."""
    spec = problem.spec
    if reason := product.unsupported_product(problem, device):
        return reason
    if problem.dtype == "float32":
        return "float32 activations: table words are fp16; use float16 or bfloat16"
    if spec.vector_axis == "out":
        return "vectors along out: each product belongs to one row, so no dot product is shared"
    if spec.max_entries > shape.ENTRIES:
        return f"{spec.max_entries:,} entries: a table's address has 8 bits of code; up to 256"
    if spec.vector_length % 2:
        return f"vectors of {spec.vector_length}: tables are built from pairs of elements"
    if spec.group_axis == "row" and spec.group_size % shape.BLOCK_ROWS:
        return (
            f"a codebook set for every {spec.group_size} rows: a warp's lookups share a table in "
            f"blocks of {shape.BLOCK_ROWS}"
        )
    return None


# ------------------------------------------------------------------------------------------------
# choices


def default(problem: Problem, device: Device) -> Config:
    """The least time by a count of clocks: builds, lookups, and what adds up spans."""
    hopper = product.arch(device) >= 90
    base = Config(
        tokens=min(4, 1 << (problem.m - 1).bit_length()),
        warps=8,
        blocks=1,
        build="mma",
        regions=1,
        split="workspace",
        splits=1,
        ring=0,
        ahead=4,
        dependent=hopper,
    )
    best = min(_candidates(base, problem, device), key=lambda one: clocks(one, problem, device))
    # 4 blocks a warp are 4 KB of codes on their way as it is
    return best.replace(ahead=0) if best.number("blocks") == 4 else best


def _candidates(base: Config, problem: Problem, device: Device) -> list[Config]:
    """Sizes and splits within the rules, registers and a block's shared memory; always one."""
    room = device.shared_bytes or 96 << 10
    splits: dict[str, tuple[int, ...]] = {"workspace": (1, 2, 4, 8, 16)}
    if product.arch(device) >= 90:
        splits = {"workspace": (1, 16), "cluster": (2, 4, 8)}
    tokens = base.number("tokens")
    found = [
        base.replace(warps=warps, blocks=blocks, regions=regions, split=split, splits=count)
        for warps in (8, 14, 16)
        for blocks in (1, 2, 4)
        for regions in (1, 2, 3)
        for split, counts in splits.items()
        for count in counts
        # of 8 warps, 8 sums a token and 8 registers of codes for each block of rows: 96 spill
        if (blocks * (tokens + 1) <= 10 if warps == 8 else tokens * blocks <= _few_sums(problem))
    ]
    fitting = [one for one in found if shape.shared_bytes(one, problem) <= room]
    return fitting or [base]


def _few_sums(problem: Problem) -> int:
    """Most `tokens * blocks` of 14 or 16 warps: 128 registers a thread, also for a build."""
    spec = problem.spec
    return 2 if spec.vector_length <= 8 and spec.subspaces == 1 else 0


def clocks(config: Config, problem: Problem, device: Device) -> float:
    """A multiprocessor's clocks for a call, roughly: what the default is chosen by."""
    spec, tokens = problem.spec, config.number("tokens")
    spans, span = shape.parts(config, problem)
    stages, tiles = len(spec.stages), span // shape.tile_columns(config)
    words = 2 if tokens == 4 else 1
    # a lookup is a wavefront a word, of which some nine in ten clocks are taken
    lookups = shape.block_rows(config, problem) * stages * (2 if tokens == 1 else 1) * words * 1.1
    build = sum(spec.stages) / 16 * 17 * words * -(-spec.vector_length // 8)
    passes = -(-stages // shape.stages_at_once(config, problem))
    blocks = shape.row_tiles(config, problem) * -(-problem.m // tokens) * spans
    # barriers of a tile; a block's beginning and end
    a_block = tiles * (lookups + build + 800 * passes) + 3000
    # a cluster's exchange, or the epilogue's launch of 2.5 us
    together = 0 if spans == 1 else 1500 if shape.clustered(config) else 4500
    return -(-blocks // device.units) * a_block + together


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Padded codes and fp16 entries; a build for every tile of rows, and an addition a lookup."""
    spec, m = problem.spec, problem.m
    rows, columns = code_grid(spec, problem.n, problem.k)
    books = product.book_entries(problem) * spec.vector_length * 2
    weight = shape.codes_bytes(config, problem) + sides_bytes(problem) + books
    weight += 4 * (rows + columns + 1)
    spans = 1 if shape.clustered(config) else shape.parts(config, problem)[0]
    width_x, _ = core_shape(spec, problem.n, problem.k)
    workspace = around.workspace_bytes(problem, spans)
    builds = 2 * m * shape.row_tiles(config, problem) * width_x * sum(spec.stages)
    flops = builds + m * rows * columns * len(spec.stages)
    return Footprint(weight, workspace, flops, shape.shared_bytes(config, problem))


# ------------------------------------------------------------------------------------------------
# packing


@functools.cache
def _places() -> tuple[Tensor, Tensor]:
    """Row and column of a block's codes as packed, `[2, 32, 4, 4]`: part, lane, word, byte."""
    part, lane, word, byte = torch.meshgrid(
        torch.arange(2), torch.arange(32), torch.arange(4), torch.arange(4), indexing="ij"
    )
    slot = 4 * part + byte // 2 + 2 * (byte % 2)
    return 4 * (slot ^ (lane // 4)) + word, lane // 4 + 8 * (lane % 4)


def pack_codes(codes: Tensor, config: Config, problem: Problem) -> Tensor:
    """`codes: [rows, columns, stages]` as the kernel reads them, uint8; padded with 0."""
    groups, tiles = shape.code_shape(config, problem)
    blocks, at_once = shape.warp_blocks(config, problem), shape.stages_at_once(config, problem)
    rows, columns, stages = codes.shape
    padding = (0, 0, 0, tiles * shape.WARP - columns, 0, groups * blocks * shape.BLOCK_ROWS - rows)
    cells = functional.pad(codes, padding).view(
        groups, blocks, shape.BLOCK_ROWS, tiles, shape.WARP, stages
    )
    row, column = _places()
    # [group, tile, stage, block, row, column]: a block's codes side by side, then in their places
    flat = cells.permute(0, 3, 5, 1, 2, 4).reshape(groups, tiles, stages, blocks, shape.BLOCK_BYTES)
    placed = flat.index_select(4, (row * shape.WARP + column).flatten())
    firsts = range(0, stages, at_once)
    passes = [placed[:, :, first : first + at_once].flatten(1) for first in firsts]
    packed = torch.cat(passes, dim=1).flatten()
    return functional.pad(packed, (0, shape.codes_bytes(config, problem) - packed.numel()))


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Codes, entries divided by a power of two so that no L1 norm exceeds 8, and that power."""
    books, sets = share_books(tensor.spec, pack_books(tensor), pack_sets(tensor))
    norm = float(books.abs().sum(dim=2).max())
    # within what fp32 holds both ways
    power = 2.0 ** min(max(math.frexp(norm)[1] - 3, -120), 120)
    arrays = {
        "codes": pack_codes(tensor.parts["codes"], config, problem),
        "books": (books / power).half(),
        "scales": torch.tensor([power], dtype=torch.float32),
    }
    numbers = {name: values.int() for name, values in sets.items()}
    return Packed(arrays | numbers | product.pack_sides(tensor))


# ------------------------------------------------------------------------------------------------
# launches


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product."""
    spec, tokens, splits = problem.spec, config.number("tokens"), config.number("splits")
    spans, span = shape.parts(config, problem)
    cluster = splits if shape.clustered(config) else 1
    passes = -(-problem.m // tokens)
    tiles = shape.row_tiles(config, problem)
    at = shape.table_bytes(config, problem)
    constants: dict[str, int | bool] = {
        "TOKENS": tokens,
        "BLOCKS": shape.warp_blocks(config, problem),
        "REGIONS": config.number("regions"),
        "X_AT": at,
        "TENSOR_BUILD": shape.tensor_build(config, problem),
        "RING": config.number("ring"),
        "SLOT_BYTES": shape.SLOT_BYTES,
        "AHEAD": config.number("ahead") // shape.warp_blocks(config, problem),
        "RING_AT": at + shape.x_bytes(config, problem),
        "CLUSTER": cluster,
        "SET_ROWS": spec.group_size if spec.group_axis == "row" else 0,
        "DEPENDENT": bool(config["dependent"]),
    }
    types = product.types(problem, "planes", 1 if cluster > 1 else spans)
    return (
        Program(
            kernel="table",
            types=types | {"Entry": "__half"},
            constants={
                **product.constants(problem, "planes"),
                **around.store(problem, 1 if cluster > 1 else spans),
                **constants,
            },
            numbers=product.numbers(problem, "planes", span),
            grid=(tiles * cluster, passes, 1 if cluster > 1 else spans),
            threads=shape.WARP * config.number("warps"),
            shared_bytes=shape.shared_bytes(config, problem),
            cluster=cluster,
            dependent=bool(config["dependent"]),
        ),
    )


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """The product; without clusters, rings and early launches on a GPU that has none."""
    if product.arch(device) < 90:
        config = config.replace(split="workspace", ring=0, dependent=False)
    return product.compiler(programs)(config, problem, device)


KERNEL = Kernel(
    name="table",
    op="linear",
    backend="cuda",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=compile,
    programs=programs,
    work=work,
    # an entry's products are summed and rounded once: of like signs, 8 of them count as one chain
    half_chain=8,
    about="dot-product tables, one conflict-free lookup a code, summed by tensor cores",
)
