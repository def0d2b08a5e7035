"""vectorized: 4, 8 or 16 bytes of codes a load, entries gathered whole, an FMA a stage.

For 65,536 entries (1 MB, more than a block's shared memory) `hot_entries` keeps the most used of
the first stage in shared memory: packing numbers entries by how often codes name them.
`books_in_l2` asks the L2 to keep the codebooks while codes stream past.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed
from vqkernels.kernels import layout
from vqkernels.kernels.cuda import counts, product, sweep, sweep_work
from vqkernels.kernels.cuda.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.tensor import QuantizedTensor
from vqkernels.work import Work

SPACE = Space(
    params=(
        Param("layout", ("words",), "rows of codes padded to 16 bytes"),
        Param("load_bytes", (4, 8, 16), "codes a load"),
        Param("hot_entries", (0, 1024, 2048, 4096, 8192, 12288), "entries in shared memory"),
        Param("books_in_l2", (False, True), "ask that L2 keep the codebooks"),
        *sweep.PARAMS,
    ),
    constraints=(sweep.REGISTERS,),
)


def supports(problem: Problem, device: Device) -> str | None:
    """What every CUDA kernel takes, up to 65,535 tokens."""
    return product.unsupported_product(problem, device)


def default(problem: Problem, device: Device) -> Config:
    """Loads of 8 bytes, so that x of a lane's columns is read again for few rows only."""
    codes = 64 // layout.code_bits(problem)
    return Config(
        layout="words",
        load_bytes=8,
        hot_entries=0,
        books_in_l2=False,
        **sweep.defaults(problem, device, codes),
    )


def hot_entries(config: Config, problem: Problem) -> int:
    """Entries kept in shared memory: no more than the first stage has."""
    return min(config.number("hot_entries"), problem.spec.stages[0])


def shared_bytes(config: Config, problem: Problem) -> int:
    """The hot entries."""
    return hot_entries(config, problem) * product.entry_bytes(problem)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """Hot entries are a block's shared memory."""
    parts, _ = sweep.parts(config, problem)
    return product.footprint(config, problem, parts, shared_bytes(config, problem))


def pack(tensor: QuantizedTensor, config: Config, problem: Problem) -> Packed:
    """Codes in words; entries of the first stage by use, where some are kept at hand."""
    if hot_entries(config, problem):
        tensor = by_use(tensor)
    return product.pack(tensor, config, problem)


def by_use(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same weight with the first stage's entries renumbered, the most used first.

    Counted over all codebook sets, which are renumbered alike.
    """
    codes, books = tensor.parts["codes"], tensor.parts["codebook_0"]
    entries = books.shape[2]
    counts = torch.bincount(codes[..., 0].flatten().int(), minlength=entries)
    order = counts.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(entries, device=order.device)
    renamed: Tensor = codes.int()
    renamed[..., 0] = ranks[renamed[..., 0]].int()
    return tensor.replace_parts(
        codes=renamed.to(codes.dtype), codebook_0=books[:, :, order].contiguous()
    )


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product, stage by stage."""
    constants = {
        "FUSED": False,
        "LOAD_BYTES": config.number("load_bytes"),
        "HOT": hot_entries(config, problem),
    }
    return (
        sweep.program(
            "vectorized",
            config,
            problem,
            constants,
            shared_bytes=shared_bytes(config, problem),
            resident="books" if config["books_in_l2"] else "",
        ),
    )


# The share of all codes that the most used entries take, of the share that they are of all entries:
# its power. k-means leaves nearly flat histograms: of 65,536 entries, 19 % serve 30 to 37 % of the
# codes and 37 % serve 53 to 62 %.
_USE = 0.65


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """Hot entries from shared memory, the others as `fused_rq` takes them."""
    (program,) = programs(config, problem)
    gather = counts.global_gather(problem, sweep_work.room(program, problem, device))
    if hot := hot_entries(config, problem):
        near, spec = counts.shared_gather(problem, 16, 1), problem.spec
        # of the first codebook set alone
        sets = product.book_entries(problem) // sum(spec.stages)
        share = (hot / spec.stages[0]) ** _USE / sets
        gather = counts.mixed(near, gather, problem, share)
    filled = shared_bytes(config, problem)
    return sweep_work.work(program, config, problem, device, gather, filled_bytes=filled)


KERNEL = Kernel(
    name="vectorized",
    op="linear",
    backend="cuda",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=pack,
    compile=product.compiler(programs),
    programs=programs,
    work=work,
    about="4 to 16 bytes of codes a load, whole-entry gathers, hot entries at hand",
)
