"""What a config of cuda/table comes to: rows, tiles and bytes, as table_words.cuh has them."""

from __future__ import annotations

from vqkernels.kernels.cuda import product
from vqkernels.parts import code_grid, codebook_sets
from vqkernels.problem import Problem
from vqkernels.space import Config

WARP = 32
BLOCK_ROWS = 32
BLOCK_BYTES = 1024  # codes of a stage: 32 rows by 32 columns
REGION_BYTES = 64 << 10
SLOT_BYTES = 4 << 10  # of a ring: 4 units of one block, or one of 4
ENTRY_BYTES = 256  # of a region, for one entry
ENTRIES = 256


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
