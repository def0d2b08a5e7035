"""mma: entries gathered whole from shared memory are operands of tensor cores.

A tensor core sums over k in any order, so a lane takes 8-element entries as they are and x in the
order that they come in: nothing is decoded, and time stays nearly flat in m up to a pass of TOKENS.
Entries are rounded to x's dtype. `variant` says which operand they are, and `combine` whether
stages are summed in fp16 first (hadd2) or each has an mma of its own, exact but for fp32 sums.
`bytes` multiplies int8 entries with a high and a low byte of x in integers, scaled once a tile.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.kernels.cuda import around, mma_work, product
from vqkernels.kernels.cuda.driver import Launcher
from vqkernels.kernels.cuda.program import Program
from vqkernels.kernels.cuda.tiles import BIG, WARP, Tiling, pack_codes
from vqkernels.kernels.cuda.vectorized import by_use
from vqkernels.kernels.linear import (
    books_bytes,
    core_shape,
    pack_books,
    pack_sets,
    sides_bytes,
)
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.tensor import QuantizedTensor
from vqkernels.work import Work

LENGTHS = (4, 8, 16, 32)
LEAST_TOKENS = {"a": 8, "b": 16, "split": 4, "bytes": 8}
LEAST_GROUP = 32  # rows of W: a tile of 64 is the least that a codebook set takes up
# multiprocessors of RTX 3090, A100, RTX 4090 and H100, and fewer where spans share them
BLOCKS = (16, 32, 64, 82, 108, 128, 132, 4096)

_PASS_BYTES = 48 << 10  # codes that a block reads while spans are added: 3 us at 16 B a clock

SPACE = Space(
    params=(
        Param("layout", ("tiles",), "order of the codes: a lane's 16 bytes of a chunk"),
        Param("variant", ("a", "b", "split", "bytes"), "which operand the weight is"),
        Param("combine", ("mma", "hadd2"), "an mma a stage, or stages summed in fp16"),
        Param("tokens", (4, 8, 16, 32, 64), "tokens a pass"),
        Param("replicas", (1, 4, 8, 16), "copies of the codebooks, in 128 bytes at most"),
        Param("warps", (4, 8, 16), "warps a block"),
        Param("warps_k", (1, 2, 4, 8, 16), "of these, along k"),
        Param("splits", (1, 2, 4, 8), "spans of k summed apart"),
        Param("depth", (1, 2, 4), "chunks of codes loaded ahead"),
        Param("hot_entries", (0, 4096, 8192, 12288), "of over 4,096 in shared memory"),
        Param("blocks", BLOCKS, "at most so many blocks along the rows"),
    ),
    constraints=(
        Constraint(
            "stages of bytes have scales of their own",
            lambda c: c.text("variant") != "bytes" or c.text("combine") == "mma",
        ),
        Constraint("warps_k within warps", lambda c: c.number("warps_k") <= c.number("warps")),
        Constraint(
            "split takes 4 tokens, others an mma's at least",
            lambda c: (
                c.number("tokens") >= LEAST_TOKENS[c.text("variant")]
                and (c.text("variant") != "split" or c.number("tokens") == 4)
            ),
        ),
        Constraint(
            "at most 128 sums a thread, 64 beside 15 other warps",
            lambda c: c.number("tokens") * c.number("warps") <= 512,
        ),
    ),
)


def supports(problem: Problem, device: Device) -> str | None:
    """Half-precision x, vectors of 4, 8, 16 or 32 along in and of 8, 16 or 32 along out."""
    spec = problem.spec
    if reason := product.unsupported_product(problem, device):
        return reason
    if problem.dtype == "float32":
        return "float32 activations: tensor cores would round them to tf32"
    if spec.vector_length not in LENGTHS:
        return f"vectors of {spec.vector_length}: an mma takes whole ones of 4, 8, 16 or 32"
    if spec.vector_axis == "out" and (reason := _unsupported_along_out(problem)):
        return reason
    if spec.group_axis == "row" and spec.group_size < min(LEAST_GROUP, problem.n):
        return (
            f"a codebook set for every {spec.group_size} rows: a tile of one set is 64 rows; "
            f"use cuda/vectorized"
        )
    least = Tiling(_simplest(problem), problem).shared_bytes
    if device.shared_bytes is not None and least > device.shared_bytes:
        return (
            f"codebooks of {least:,} bytes: a block of {device.name} has {device.shared_bytes:,} "
            f"of shared memory; use cuda/vectorized"
        )
    return None


def _unsupported_along_out(problem: Problem) -> str | None:
    spec = problem.spec
    if spec.vector_length == 4:
        return "vectors of 4 along the outputs: an mma takes whole ones of 8, 16 or 32"
    if spec.subspaces > 1:
        return "subspaces along the outputs: rows of a tile would have codebooks of their own"
    if spec.group_axis == "column" and spec.group_size % 8:
        return f"groups of {spec.group_size} columns: a lane's 8 neighbours share a codebook"
    return None


def _simplest(problem: Problem) -> Config:
    """The config with the least shared memory."""
    return Config(
        layout="tiles",
        variant="a" if problem.m > 4 else "split",
        combine="mma",
        tokens=8 if problem.m > 4 else 4,
        replicas=1,
        warps=4,
        warps_k=1,
        splits=1,
        depth=1,
        hot_entries=0,
        blocks=BLOCKS[-1],
    )


def default(problem: Problem, device: Device) -> Config:
    """The variant for m and the architecture, and the most copies that fit beside the sums."""
    arch = int(device.arch.removeprefix("sm_"))
    room = device.shared_bytes or 48 << 10
    config = _shaped(_simplest(problem).replace(**_variant(problem, arch)), problem, device)
    choices = [config.replace(replicas=replicas) for replicas in (8, 4)]
    fit = (one for one in choices if Tiling(one, problem).shared_bytes <= room)
    choice = next(fit, config)
    if all(entries <= BIG for entries in problem.spec.stages):
        return choice
    warmer = [choice.replace(hot_entries=hot) for hot in (12288, 8192, 4096)]
    return next((one for one in warmer if Tiling(one, problem).shared_bytes <= room), choice)


def _variant(problem: Problem, arch: int) -> dict[str, str | int]:
    """The fewest mma that take m tokens: exact ones, but for half-rate fp32 sums and large m.

    Passes of 32 at most: 64 tokens' sums leave too few registers for what is gathered ahead.
    """
    tokens = next((t for t in (4, 8, 16) if t >= problem.m), 32)
    if tokens == 4 and problem.spec.vector_length == 4:
        tokens = 8
    slow = arch in (86, 87, 88, 89) or arch >= 120
    # H100's tensor cores outrun its shared memory with twice the mma that W as A needs
    variant = "split" if tokens == 4 else "a" if tokens == 8 and arch not in (90, 100) else "b"
    return {
        "variant": variant,
        "tokens": max(LEAST_TOKENS[variant], tokens),
        "combine": "hadd2" if slow or problem.m > 16 else "mma",
    }


def _shaped(config: Config, problem: Problem, device: Device) -> Config:
    """Eight warps, of which 16 would have 128 registers a thread each and few entries on their way;
    spans of k where they fill idle multiprocessors by more than the second pass costs.
    """
    config = config.replace(warps=8)
    chunks = Tiling(config, problem).chunks
    warps_k = max(w for w in (1, 2, 4, 8) if w == 1 or 2 * w <= chunks)
    config = config.replace(warps_k=warps_k)
    tiling = Tiling(config, problem)
    passes = -(-problem.m // tiling.tokens)

    def blocks(splits: int) -> int:
        """So many that all run at once, if it can be."""
        wanted = max(BLOCKS[0], device.units // (splits * passes))
        return max(count for count in BLOCKS if count <= wanted)

    def bytes_read(splits: int) -> float:
        """Of codes, by the block with the most."""
        units = -(-tiling.units // min(tiling.units, blocks(splits)))
        return units * 4 * tiling.code_words / tiling.units / splits

    room = max(1, min(chunks // warps_k, device.units // (passes * BLOCKS[0])))
    splits = min(
        (s for s in (1, 2, 4, 8) if s <= room),
        key=lambda s: bytes_read(s) + (_PASS_BYTES if s > 1 else 0),
    )
    # 1 KB of codes a chunk and warp where two stages have a byte each: 32 KB in flight
    share = chunks // (warps_k * splits)
    most = 4 if len(problem.spec.stages) <= 2 else 2
    depth = max(d for d in (1, 2, 4) if d == 1 or d <= min(most, share))
    return config.replace(splits=splits, blocks=blocks(splits), depth=depth)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Codes padded to whole tiles; codebooks, copies and exchanged sums in shared memory."""
    tiling = Tiling(config, problem)
    rows, columns = tiling.grid
    weight = 4 * tiling.code_words + sides_bytes(problem) + books_bytes(problem)
    weight += 4 * (rows + columns + tiling.row_sets * len(problem.spec.stages))
    workspace = around.workspace_bytes(problem, config.number("splits"))
    if tiling.variant == "bytes":
        width, _ = core_shape(problem.spec, problem.n, problem.k)
        workspace += 4 * problem.m * 4 * width  # x in fp32, and as integers before they are bytes
    return Footprint(weight, workspace, problem.flops, tiling.shared_bytes)


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Codes in tiles, entries in x's dtype or as bytes; the hot ones first, where some are."""
    tiling = Tiling(config, problem)
    if 0 < tiling.slots.resident[0] < problem.spec.stages[0]:
        tensor = by_use(tensor)
    sets = {name: values.int() for name, values in pack_sets(tensor).items()}
    packed = {"codes": pack_codes(tensor, tiling)} | sets | product.pack_sides(tensor)
    if tiling.variant == "bytes":
        return Packed(packed | _pack_bytes(tensor))
    return Packed(packed | {"books": pack_books(tensor).to(problem.torch_dtype)})


def _pack_bytes(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """int8 codebooks `[sets, entries, length]` and their scales `[sets, stages]`."""
    spec, parts = tensor.spec, tensor.parts
    books = [parts[f"codebook_{stage}"] for stage in range(len(spec.stages))]
    factors = torch.tensor([spec.coefficient(stage) for stage in range(len(spec.stages))])
    scales = parts["codebook_scale"].float() * factors
    joined = torch.cat(books, dim=2).flatten(0, 1).contiguous()
    return {"books": joined, "scales": scales.flatten(0, 1).contiguous()}


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product."""
    tiling = Tiling(config, problem)
    slots, along_in = tiling.slots, tiling.along_in
    bytes_ = tiling.variant == "bytes"
    spans = config.number("splits")
    types = product.types(problem, "words", spans)
    types["Entry"] = types["X"]
    if bytes_:
        types |= {"X": "signed char", "Entry": "signed char", "Out": "float"}
    constants = product.constants(problem, "words")
    del constants["LAYOUT"]
    several = tiling.row_sets > 1
    constants |= {
        "VARIANT": f"vq::Variant::{tiling.variant}",
        "TOKENS": tiling.tokens,
        "HADD2": tiling.hadd2,
        "CODES": tiling.lane_codes,
        "DEPTH": config.number("depth"),
        "CODE_BYTES": tiling.code_bytes(),
        "HOT": slots.resident,
        "BEFORE": tuple(itertools.accumulate((0, *problem.spec.stages[:-1]))),
        "SLOT": slots.slot,
        "STRIDE": slots.stride,
        "COPIES": slots.copies,
        "BY_BYTE": tuple(int(one) for one in slots.by_byte),
        "SETS": tiling.column_sets,
        "SET_BYTES": slots.set_bytes if tiling.column_sets > 1 else 0,
        "CHECKED": tiling.grid[1] % tiling.chunk_columns != 0,
        "X_WHOLE": along_in or problem.k % 8 == 0,
        "WARPS_K": tiling.warps_k,
        "ROUND": tiling.round,
        "ROUND_AT": tiling.round_at,
        "SET_ROWS": tiling.set_rows if several else 0,
        "SET_UNITS": tiling.set_units if several else 0,
    }
    constants["COLUMN_SETS"] = tiling.column_sets > 1
    # of bytes, each token's scale is still to come
    constants |= {"FINAL": False} if bytes_ else around.store(problem, spans)
    units = min(tiling.units, config.number("blocks"))
    return (
        Program(
            kernel="mma",
            types=types,
            constants=constants,
            numbers=product.numbers(problem, "words", 0),
            grid=(units, -(-problem.m // tiling.tokens), spans),
            threads=WARP * config.number("warps"),
            shared_bytes=tiling.shared_bytes,
        ),
    )


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """Entries from shared memory, x from L1 or L2, and tensor cores that take all they give."""
    (program,) = programs(config, problem)
    return mma_work.work(program, Tiling(config, problem), device)


def split_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[m, k]` as bytes `[m, k / 4, 2, 4]`, high ones and low ones, and scales `[m, 1]`.

    x = scale * (256 * high + low) to 1 in 65,278 of the token's largest.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / 32639
    # a token of zeros, or one that isn't finite, is zeros here; its scale tells them apart
    whole = (wide / scale).nan_to_num(0, 0, 0).round().int()
    high = (whole + 128) >> 8
    pairs = torch.stack((high, whole - 256 * high), dim=1).to(torch.int8)
    return pairs.view(len(x), 2, -1, 4).transpose(1, 2).contiguous(), scale


def compile(config: Config, problem: Problem, device: Device) -> Run:
    """The product; of bytes, between splitting x and scaling y."""
    (one,) = programs(config, problem)
    if Tiling(config, problem).variant != "bytes":
        return product.compiler(programs)(config, problem, device)
    launch = Launcher(one, device)

    def core(packed: Packed, x: Tensor, y: Tensor) -> None:
        pairs, scale = split_bytes(x)
        launch({**product.arrays_of(packed), "x": pairs, "out": y})
        y.mul_(scale)

    return around.surround(core, problem, device, parts=one.grid[2], sums=torch.float32)


KERNEL = Kernel(
    name="mma",
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
    about="whole entries as operands of tensor cores, k in their order",
    rounds_weights=True,
)
