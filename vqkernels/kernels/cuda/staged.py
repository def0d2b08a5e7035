"""staged: all codebooks in shared memory, `replicas` times, gathered from there.

A block loads the codebooks once and goes on over rows of codes. An unreplicated gather of 16-byte
entries meets 2.5 ways in the banks with random codes; with `replicas * gather_bytes` = 128 the
lanes that the hardware serves together have banks of their own, at that many times the memory and
the filling. One replica is filled by the copy engine on sm_90, by cp.async before it.
"""

from __future__ import annotations

from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel
from vqkernels.kernels import layout
from vqkernels.kernels.cuda import counts, product, sweep, sweep_work
from vqkernels.kernels.cuda.program import Program
from vqkernels.problem import Problem
from vqkernels.space import Config, Constraint, Param, Space
from vqkernels.work import Work

SPACE = Space(
    params=(
        Param("layout", (*layout.LAYOUTS, "words"), "order of the codes"),
        Param("load_bytes", (4, 8, 16), "codes a load, in the layout words"),
        Param("gather_bytes", (4, 8, 16), "of an entry at once"),
        Param("replicas", (1, 2, 4, 8, 16, 32), "copies of the codebooks"),
        *sweep.PARAMS,
    ),
    constraints=(
        sweep.REGISTERS,
        Constraint(
            "replicas within the 128 bytes of all banks",
            lambda c: c.number("replicas") * c.number("gather_bytes") <= 128,
        ),
        Constraint(
            "load_bytes matters in the layout words alone",
            lambda c: c.text("layout") == "words" or c.number("load_bytes") == 4,
        ),
    ),
)

_BARRIER_BYTES = 16  # behind the codebooks: the copy engine's barrier


def shared_bytes(config: Config, problem: Problem) -> int:
    """All copies, and the barrier that one copy is waited for with."""
    books = product.book_entries(problem) * product.entry_bytes(problem)
    if config.number("replicas") > 1:
        return books * config.number("replicas")
    return -(-books // 16) * 16 + _BARRIER_BYTES


def supports(problem: Problem, device: Device) -> str | None:
    """Codebooks that fit the shared memory of a block."""
    if reason := product.unsupported_product(problem, device):
        return reason
    books = product.book_entries(problem) * product.entry_bytes(problem) + _BARRIER_BYTES
    if device.shared_bytes is not None and books > device.shared_bytes:
        return (
            f"codebooks of {books:,} bytes: a block of {device.name} has {device.shared_bytes:,} "
            f"of shared memory; use cuda/vectorized"
        )
    return None


def default(problem: Problem, device: Device) -> Config:
    """Conflict-free copies where two blocks of them fit, else one copy; a block or two a unit."""
    room = (device.shared_bytes or 48 << 10) // 2
    base = Config(
        layout="words",
        load_bytes=4,
        gather_bytes=16,
        replicas=8,
        **sweep.defaults(problem, device, 32 // layout.code_bits(problem)),
    )
    if shared_bytes(base, problem) > room:
        base = base.replace(replicas=1)
    blocks = min(sweep.BLOCKS, key=lambda count: abs(count - 2 * device.units))
    return base.replace(warps=8, blocks=blocks)


def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
    """The copies are a block's shared memory."""
    parts, _ = sweep.parts(config, problem)
    return product.footprint(config, problem, parts, shared_bytes(config, problem))


def programs(config: Config, problem: Problem) -> tuple[Program, ...]:
    """One product, stage by stage."""
    constants = {
        "FUSED": False,
        "LOAD_BYTES": config.number("load_bytes"),
        "GATHER": config.number("gather_bytes"),
        "REPLICAS": config.number("replicas"),
        "BOOK_ENTRIES": product.book_entries(problem),
    }
    shared = shared_bytes(config, problem)
    return (sweep.program("staged", config, problem, constants, shared_bytes=shared),)


def work(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
    """Entries from shared memory, which every block fills first."""
    (program,) = programs(config, problem)
    copies = config.number("replicas")
    gather = counts.shared_gather(problem, config.number("gather_bytes"), copies)
    books = product.book_entries(problem) * product.entry_bytes(problem)
    return sweep_work.work(
        program, config, problem, device, gather, filled_bytes=books, copies=copies
    )


KERNEL = Kernel(
    name="staged",
    op="linear",
    backend="cuda",
    runs_on=("cuda",),
    space=SPACE,
    supports=supports,
    default=default,
    footprint=footprint,
    pack=product.pack,
    compile=product.compiler(programs),
    programs=programs,
    work=work,
    about="codebooks in shared memory, replicated at will",
)
