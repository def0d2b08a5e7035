"""table: each code is one lookup in a table of its entry's products with x, built beforehand.

For m = 1 to 4 a gather of whole entries moves 16 bytes of shared memory a code, a looked-up product
2 (4 where a word serves one token in two columns of codes): the table's words lie so that no two
lanes ever meet in a bank, and tensor cores add them up. Words are fp16: x is scaled to their range
by a power of two a token, entries by one that `scales` holds. More than `tokens` tokens are passes.

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
from vqkernels.kernels.cuda import product
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.linear import core_shape, pack_books, pack_sets, pack_sides, sides_bytes
from vqkernels.parts import code_grid, codebook_sets
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.tensor import QuantizedTensor

WARP = 32
BLOCK_ROWS = 32
BLOCK_BYTES = 1024  # codes of a stage: 32 rows by 32 columns
REGION_BYTES = 64 << 10
SLOT_BYTES = 4 << 10  # of a ring: 4 units of one block, or one of 4
ENTRY_BYTES = 256  # of a region, for one entry
ENTRIES = 256

SPACE = Space(
    params=(
        Param("tokens", (1, 2, 4), "tokens that share a lookup"),
        Param("warps", (4, 8, 14, 16), "warps a block"),
        Param("blocks", (1, 2, 4), "blocks of 32 rows a warp"),
        Param("build", ("mma", "fma"), "what fills the tables: tensor cores, or fp32 FMAs"),
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
    if spec.max_entries > ENTRIES:
        return f"{spec.max_entries:,} entries: a table's address has 8 bits of code; up to 256"
    if spec.vector_length % 2:
        return f"vectors of {spec.vector_length}: tables are built from pairs of elements"
    if spec.group_axis == "row" and spec.group_size % BLOCK_ROWS:
        return (
            f"a codebook set for every {spec.group_size} rows: a warp's lookups share a table in "
            f"blocks of {BLOCK_ROWS}"
        )
    return None


# ------------------------------------------------------------------------------------------------
# geometry, as table_words.cuh and table_build.cuh have it


def stages_at_once(config: Config, problem: Problem) -> int:
    """Stages whose tables are there together."""
    a_region = 1 if config.number("tokens") == 4 else 2
    return min(len(problem.spec.stages), config.number("regions") * a_region)


def tile_columns(config: Config) -> int:
    """Columns of codes in a tile: a word is two of them where it serves one token."""
    return 2 * WARP if config.number("tokens") == 1 else WARP


def warp_blocks(config: Config, problem: Problem) -> int:
    """Blocks of rows a warp: of one codebook set."""
    blocks, spec = config.number("blocks"), problem.spec
    while spec.group_axis == "row" and spec.group_size % (BLOCK_ROWS * blocks):
        blocks //= 2
    return blocks


def block_rows(config: Config, problem: Problem) -> int:
    """Rows of a thread block."""
    return BLOCK_ROWS * warp_blocks(config, problem) * config.number("warps")


def row_tiles(config: Config, problem: Problem) -> int:
    """Thread blocks along the rows; each within one codebook set."""
    spec, rows = problem.spec, block_rows(config, problem)
    if spec.group_axis != "row":
        return -(-problem.n // rows)
    return codebook_sets(spec, problem.n, problem.k) * -(-spec.group_size // rows)


def clustered(config: Config) -> bool:
    """Whether the spans of k are the blocks of a cluster."""
    return config.text("split") == "cluster"


def table_bytes(config: Config, problem: Problem) -> int:
    """The tables; at the end, row sums that a cluster's other blocks read lie there."""
    stages = stages_at_once(config, problem)
    regions = -(-stages // (1 if config.number("tokens") == 4 else 2))
    last = ENTRY_BYTES * -(-problem.spec.max_entries // 16) * 16
    sums = 4 * config.number("tokens") * block_rows(config, problem) if clustered(config) else 0
    return max((regions - 1) * REGION_BYTES + last, sums)


def x_bytes(config: Config, problem: Problem) -> int:
    """x of a tile, factors and inverses, and the maxima of the warps; whole lines of 128 bytes."""
    tokens, chunks = config.number("tokens"), -(-problem.spec.vector_length // 8)
    words = 256 * chunks * (2 if tokens == 4 else 1)
    return -(-4 * (words + (2 + config.number("warps")) * tokens) // 128) * 128


def shared_bytes(config: Config, problem: Problem) -> int:
    """Tables, x, and each warp's ring with its barriers."""
    ring = config.number("ring") * config.number("warps") * (SLOT_BYTES + 8)
    return table_bytes(config, problem) + x_bytes(config, problem) + ring


def tensor_build(config: Config, problem: Problem) -> bool:
    """Whether tensor cores build: columns that share an instruction must share a codebook."""
    spec = problem.spec
    shared = spec.group_axis != "column" and 8 % spec.subspaces == 0
    return config.text("build") == "mma" and shared


def parts(config: Config, problem: Problem) -> tuple[int, int]:
    """Spans and their columns: whole tiles."""
    return product.spans(problem, config.number("splits"), tile_columns(config))


def code_shape(config: Config, problem: Problem) -> tuple[int, int]:
    """Groups of a warp's rows, and tiles of 32 columns: whole tiles of words."""
    spec, tile = problem.spec, tile_columns(config)
    _, columns = code_grid(spec, problem.n, problem.k)
    groups = -(-problem.n // (BLOCK_ROWS * warp_blocks(config, problem)))
    return groups, -(-columns // tile) * tile // WARP


def codes_bytes(config: Config, problem: Problem) -> int:
    """Packed codes, and what registers load and L2 is asked for past their end."""
    groups, tiles = code_shape(config, problem)
    unit = BLOCK_BYTES * warp_blocks(config, problem)
    past = max(unit, config.number("ahead") << 10)
    return groups * tiles * len(problem.spec.stages) * unit + past


# ------------------------------------------------------------------------------------------------
# choices


def default(problem: Problem, device: Device) -> Config:
    """The least time by a count of cycles: builds, lookups, and blocks that wait for others."""
    tokens = min(4, 1 << (problem.m - 1).bit_length())
    hopper = product.arch(device) >= 90
    base = Config(
        tokens=tokens,
        warps=16,
        blocks=1,
        build="mma",
        regions=1,
        split="workspace",
        splits=1,
        ring=0,
        ahead=4,
        dependent=hopper,
    )
    best = min(_candidates(base, problem, device), key=lambda one: cycles(one, problem, device))
    if best.number("blocks") == 4:
        best = best.replace(ahead=0)  # 4 KB a warp are on their way as it is
    if hopper and 2 <= best.number("splits") <= 8:
        best = best.replace(split="cluster")
    return best


def _candidates(base: Config, problem: Problem, device: Device) -> list[Config]:
    """Sizes and splits within the rules, registers and a block's shared memory; always one."""
    room = device.shared_bytes or 96 << 10
    found = [
        base.replace(warps=warps, blocks=blocks, regions=regions, splits=splits)
        for warps in (8, 14, 16)
        for blocks in (1, 2, 4)
        for regions in (1, 2, 3)
        for splits in (1, 2, 4, 8, 16)
        if base.number("tokens") * blocks <= (8 if warps == 8 else _many_warps_sums(problem))
    ]
    fitting = [one for one in found if shared_bytes(one, problem) <= room]
    return fitting or [base.replace(warps=8)]


def _many_warps_sums(problem: Problem) -> int:
    """Most `tokens * blocks` of 14 or 16 warps: 128 registers a thread, also for a build."""
    spec = problem.spec
    return 2 if spec.vector_length <= 8 and spec.subspaces == 1 else 0


def cycles(config: Config, problem: Problem, device: Device) -> float:
    """A multiprocessor's clocks for a call, roughly: what the default is chosen by."""
    spec, tokens = problem.spec, config.number("tokens")
    spans, span = parts(config, problem)
    stages, tiles = len(spec.stages), span // tile_columns(config)
    words = 2 if tokens == 4 else 1
    # a lookup is a wavefront a word, of which some nine in ten clocks are taken
    lookups = block_rows(config, problem) * stages * (2 if tokens == 1 else 1) * words * 1.1
    build = sum(spec.stages) / 16 * 17 * words * -(-spec.vector_length // 8)
    passes = -(-stages // stages_at_once(config, problem))
    blocks = row_tiles(config, problem) * -(-problem.m // tokens) * spans
    # barriers of a tile, a block's beginning and end, and what adding up spans costs
    a_block = tiles * (lookups + build + 800 * passes) + 3000
    return -(-blocks // device.units) * a_block + 1000 * math.log2(spans)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Padded codes and fp16 entries; a build for every tile of rows, and an addition a lookup."""
    spec, m = problem.spec, problem.m
    rows, columns = code_grid(spec, problem.n, problem.k)
    books = product.book_entries(problem) * spec.vector_length * 2
    weight = codes_bytes(config, problem) + sides_bytes(problem) + books
    weight += 4 * (rows + columns + 1)
    spans = 1 if clustered(config) else parts(config, problem)[0]
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    workspace = 4 * m * (2 * width_x + (2 + (spans if spans > 1 else 0)) * width_y)
    builds = 2 * m * row_tiles(config, problem) * width_x * sum(spec.stages)
    flops = builds + m * rows * columns * len(spec.stages)
    return Footprint(weight, workspace, flops, shared_bytes(config, problem))


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
    groups, tiles = code_shape(config, problem)
    blocks, at_once = warp_blocks(config, problem), stages_at_once(config, problem)
    rows, columns, stages = codes.shape
    padding = (0, 0, 0, tiles * WARP - columns, 0, groups * blocks * BLOCK_ROWS - rows)
    cells = functional.pad(codes, padding).view(groups, blocks, BLOCK_ROWS, tiles, WARP, stages)
    row, column = _places()
    # [group, tile, stage, block, row, column]: a block's codes side by side, then in their places
    flat = cells.permute(0, 3, 5, 1, 2, 4).reshape(groups, tiles, stages, blocks, BLOCK_BYTES)
    placed = flat.index_select(4, (row * WARP + column).flatten())
    firsts = range(0, stages, at_once)
    passes = [placed[:, :, first : first + at_once].flatten(1) for first in firsts]
    packed = torch.cat(passes, dim=1).flatten()
    return functional.pad(packed, (0, codes_bytes(config, problem) - packed.numel()))


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Codes, entries divided by a power of two so that no L1 norm exceeds 8, and that power."""
    books = pack_books(tensor)
    norm = float(books.abs().sum(dim=2).max())
    # within what fp32 holds both ways
    power = 2.0 ** min(max(math.frexp(norm)[1] - 3, -120), 120)
    arrays = {
        "codes": pack_codes(tensor.parts["codes"], config, problem),
        "books": (books / power).half(),
        "scales": torch.tensor([power], dtype=torch.float32),
    }
    sets = {name: values.int() for name, values in pack_sets(tensor).items()}
    return Packed(arrays | sets | pack_sides(tensor))


# ------------------------------------------------------------------------------------------------
# launches


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product."""
    spec, tokens, splits = problem.spec, config.number("tokens"), config.number("splits")
    spans, span = parts(config, problem)
    cluster = splits if clustered(config) else 1
    passes = -(-problem.m // tokens)
    tiles = row_tiles(config, problem)
    at = table_bytes(config, problem)
    constants: dict[str, int | bool] = {
        "TOKENS": tokens,
        "BLOCKS": warp_blocks(config, problem),
        "REGIONS": config.number("regions"),
        "X_AT": at,
        "TENSOR_BUILD": tensor_build(config, problem),
        "RING": config.number("ring"),
        "SLOT_BYTES": SLOT_BYTES,
        "AHEAD": config.number("ahead") // warp_blocks(config, problem),
        "RING_AT": at + x_bytes(config, problem),
        "CLUSTER": cluster,
        "SET_ROWS": spec.group_size if spec.group_axis == "row" else 0,
        "DEPENDENT": bool(config["dependent"]),
    }
    types = product.types(problem, "planes", 1 if cluster > 1 else spans)
    return (
        Program(
            kernel="table",
            types=types | {"Entry": "__half"},
            constants={**product.constants(problem, "planes"), **constants},
            numbers=product.numbers(problem, "planes", span),
            grid=(tiles * cluster, passes, 1 if cluster > 1 else spans),
            threads=WARP * config.number("warps"),
            shared_bytes=shared_bytes(config, problem),
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
    # an entry's products are summed and rounded once: of like signs, 8 of them count as one chain
    half_chain=8,
    about="dot-product tables, one conflict-free lookup a code, summed by tensor cores",
)
