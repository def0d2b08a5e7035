"""The host half of include/sweep.cuh: what fused_rq, vectorized and staged choose alike."""

from __future__ import annotations

from collections.abc import Mapping

from vqkernels.device import Device
from vqkernels.kernels import layout
from vqkernels.kernels.cuda import product
from vqkernels.kernels.cuda.program import Program
from vqkernels.parts import code_grid
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param

__all__ = ["BLOCKS", "PARAMS", "REGISTERS", "defaults", "lane_codes", "parts", "program"]

WARP = 32

BLOCKS = (64, 128, 132, 264, 528, 1056, 4096)

PARAMS = (
    Param("tokens", (1, 2, 4, 8), "tokens that share a decode"),
    Param("rows", (1, 2, 4, 8), "rows of codes a warp has in hand"),
    Param("splits", (1, 2, 4, 8, 16, 32), "spans of k summed apart"),
    Param("warps", (1, 2, 4, 8, 16), "warps a block"),
    Param("blocks", BLOCKS, "at most so many blocks along the rows"),
)

# A sum a row and token along in, and `vector_length` along out; x of every token, a vector each.
# Within 255 registers beside codes and addresses.
REGISTERS = Constraint(
    "at most 16 rows times tokens a warp", lambda c: c.number("rows") * c.number("tokens") <= 16
)


def lane_codes(config: Config, problem: Problem) -> int:
    """Neighbouring codes that a lane takes at once."""
    if config.text("layout") != "words":
        return 1
    return config.number("load_bytes") * 8 // layout.code_bits(problem)


def parts(config: Config, problem: Problem) -> tuple[int, int]:
    """Spans and their columns: a lane's codes lie in one span."""
    return product.spans(problem, config.number("splits"), lane_codes(config, problem))


def defaults(problem: Problem, device: Device, codes: int) -> dict[str, int]:
    """tokens, rows, splits, warps and blocks: enough warps to keep every multiprocessor busy.

    codes: that a lane takes at once.
    """
    code_rows, columns = code_grid(problem.spec, problem.n, problem.k)
    length = problem.spec.vector_length
    along_out = problem.spec.vector_axis == "out"
    # sums of a warp: rows * tokens, each a vector along out; 32 fp32 registers hold them
    room = max(1, 32 // length if along_out else 16)
    tokens = max(t for t in (1, 2, 4, 8) if t == 1 or (t <= problem.m and t * length <= 32))
    tokens = min(tokens, room)
    rows = max(r for r in (1, 2, 4) if r == 1 or r * tokens <= room)
    warps_wanted = 16 * device.units
    warps_there = -(-code_rows // rows) * -(-problem.m // tokens)
    most = max(1, columns // (WARP * codes))
    splits = max(
        s for s in (1, 2, 4, 8, 16, 32) if s == 1 or (s <= most and s * warps_there <= warps_wanted)
    )
    return {"tokens": tokens, "rows": rows, "splits": splits, "warps": 4, "blocks": 4096}


def program(
    kernel: str,
    config: Config,
    problem: Problem,
    constants: Mapping[str, int | bool],
    *,
    shared_bytes: int = 0,
    resident: str = "",
) -> Program:
    """The program of a kernel whose text calls `sweep`, with the constants of its own."""
    code_layout, warps = config.text("layout"), config.number("warps")
    rows, tokens = config.number("rows"), config.number("tokens")
    code_rows, _ = code_grid(problem.spec, problem.n, problem.k)
    spans, span = parts(config, problem)
    tiles = -(-code_rows // (rows * warps))
    return Program(
        kernel=kernel,
        types=product.types(problem, code_layout, spans),
        constants={
            **product.constants(problem, code_layout),
            "ROWS": rows,
            "TOKENS": tokens,
            **constants,
        },
        numbers=product.numbers(problem, code_layout, span),
        grid=(min(tiles, config.number("blocks")), -(-problem.m // tokens), spans),
        threads=WARP * warps,
        shared_bytes=shared_bytes,
        resident=resident,
    )
