"""Runs the text of CUDA kernels on the CPU, and reports what a GPU would let pass.

`build` compiles kernels with g++ against include/device.cuh of this folder, whose functions have
the names of the kernels' own. `Library.run` launches one: a fiber a thread, each access checked.
One launch at a time in a process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tests.cuda.records import (
    BufferStruct,
    Fault,
    FaultStruct,
    Kind,
    LaunchStruct,
    Report,
    Site,
    SiteStruct,
)
from tests.cuda.units import BuildError, Program, Source, compile_unit, runtime
from vqkernels.device import Device

__all__ = [
    "ORDERS",
    "BuildError",
    "Fault",
    "Kind",
    "Library",
    "Report",
    "Site",
    "Source",
    "build",
    "build_programs",
    "launcher",
    "run_orders",
    "run_program",
]

# Between buffers, so that a wild access hits none; what cudaMalloc aligns to.
RED_ZONE = 4096
ALIGNMENT = 256

# Of a block: what any GPU launches, and what an H100 has.
MOST_THREADS = 1024
MOST_SHARED = 227 << 10

# The seeds that try each kind of order: forward, reverse, and two random ones.
ORDERS = (0, 1, 2, 3)

# Kernels a unit: the headers cost g++ 0.1 s, a kernel 0.02 to 0.06 s.
UNIT = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Library:
    """Compiled kernels, by their place in what was built."""

    handle: ctypes.CDLL
    count: int

    def run(
        self,
        index: int,
        arguments: Callable[[Mapping[str, Tensor]], ctypes.Structure],
        buffers: Mapping[str, Tensor],
        *,
        grid: tuple[int, int, int] = (1, 1, 1),
        threads: int = 32,
        cluster: int = 1,
        shared_bytes: int = 0,
        writable: Collection[str] = ("out",),
        initialised: Collection[str] = (),
        seed: int = 0,
        counting: bool = True,
        max_faults: int = 8,
        skew: int = 0,
    ) -> Report:
        """Launch kernel `index` on copies of `buffers`; what it wrote is copied back.

        arguments: makes the kernel's argument of the copies. writable: what it may write;
        initialised: which of these it may read first (the others hold NaNs). cluster: blocks
        along x that run together. seed: 0 runs threads forward, 1 in reverse, others at random,
        preempted at accesses. skew: bytes by which buffers miss a multiple of 256.
        """
        assert 0 <= index < self.count, f"kernel {index} of {self.count}"
        assert grid[0] % cluster == 0 and 1 <= cluster <= 16, f"clusters of {cluster}"
        assert 1 <= threads <= MOST_THREADS, f"{threads} threads a block"
        assert 0 <= shared_bytes <= MOST_SHARED, f"{shared_bytes} bytes of shared memory"
        memory = _Memory(buffers, writable, initialised, skew)
        argument = arguments(memory.tensors)
        launch = LaunchStruct(
            ctypes.cast(ctypes.pointer(argument), ctypes.c_void_p),
            memory.table,
            len(buffers),
            (ctypes.c_int32 * 3)(*grid),
            threads,
            cluster,
            shared_bytes,
            counting,
            max_faults,
            seed,
        )
        kernels = (ctypes.c_void_p * self.count).in_dll(self.handle, "vq_kernels")
        runtime().vq_launch(ctypes.c_void_p(kernels[index]), ctypes.byref(launch))
        memory.copy_back(buffers, writable)
        return Report(_records("vq_faults", FaultStruct), _records("vq_sites", SiteStruct))


def _records(function: str, kind: Any) -> tuple[Any, ...]:
    first = ctypes.POINTER(kind)()
    count = getattr(runtime(), function)(ctypes.byref(first))
    return tuple(first[i].record() for i in range(count))


class _Memory:
    """Device memory: an aligned copy of each buffer, with red zones around."""

    def __init__(
        self,
        buffers: Mapping[str, Tensor],
        writable: Collection[str],
        initialised: Collection[str],
        skew: int,
    ) -> None:
        sizes = [_whole(tensor.nbytes) + RED_ZONE for tensor in buffers.values()]
        self.arena = torch.full((sum(sizes) + 2 * RED_ZONE,), 255, dtype=torch.uint8)
        start = RED_ZONE - self.arena.data_ptr() % ALIGNMENT + skew
        self.tensors: dict[str, Tensor] = {}
        self.table = (BufferStruct * len(buffers))()
        for i, ((name, tensor), size) in enumerate(zip(buffers.items(), sizes, strict=True)):
            raw = self.arena[start : start + tensor.nbytes]
            assert tensor.is_contiguous(), f"{name}: a kernel is given a pointer, no strides"
            copy = raw.view(tensor.dtype).view(tensor.shape)
            if name not in writable or name in initialised:
                copy.copy_(tensor)
            self.tensors[name] = copy
            self.table[i] = BufferStruct(
                name.encode(), raw.data_ptr(), raw.nbytes, name in writable, name in initialised
            )
            start += size

    def copy_back(self, buffers: Mapping[str, Tensor], writable: Collection[str]) -> None:
        for name in writable:
            if name in buffers:
                buffers[name].copy_(self.tensors[name])


def _whole(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ------------------------------------------------------------------------------------------ builds


def build(kernels: Sequence[Program | Source], *, bulk_copies: bool = True) -> Library:
    """Compile kernels as one unit, once a session.

    bulk_copies: what `VQ_HAS_BULK_COPIES` says: False is a GPU before sm_90. Raises BuildError.
    """
    library = Library(compile_unit(kernels, bulk_copies=bulk_copies), len(kernels))
    for index, kernel in enumerate(kernels):
        if not isinstance(kernel, Source):
            _built[_key(kernel, bulk_copies)] = library, index
    return library


def build_programs(programs: Sequence[Program], *, bulk_copies: bool = True) -> None:
    """Compile programs ahead of `run_program`: units of a kernel's, several at once."""
    new = {_key(p, bulk_copies): p for p in programs}
    by_kernel: dict[str, list[Program]] = {}
    for key, program in new.items():
        if key not in _built:
            by_kernel.setdefault(program.kernel, []).append(program)
    units = [some[i : i + UNIT] for some in by_kernel.values() for i in range(0, len(some), UNIT)]
    runtime()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda unit: build(unit, bulk_copies=bulk_copies), units))


# Where the programs that were built are, by their text.
_built: dict[tuple[str, str, bool], tuple[Library, int]] = {}


def _key(program: Program, bulk_copies: bool) -> tuple[str, str, bool]:
    return program.kernel, program.declaration(), bulk_copies


# ------------------------------------------------------------------------------------------- runs


def run_program(
    program: Program, tensors: Mapping[str, Tensor], *, bulk_copies: bool = True, **options: Any
) -> Report:
    """What a launch of `program` does on a GPU; options are those of `Library.run`.

    Compiled here, on its own, unless it was among the kernels of an earlier `build`.
    """
    key = _key(program, bulk_copies)
    if key not in _built:
        build([program], bulk_copies=bulk_copies)
    library, index = _built[key]
    return library.run(
        index,
        program.arguments,
        tensors,
        grid=program.grid,
        threads=program.threads,
        cluster=program.cluster,
        shared_bytes=program.shared_bytes,
        **{"writable": program.writes, **options},
    )


def launcher(**options: Any) -> Callable[[Program, Device], Callable[[Mapping[str, Tensor]], None]]:
    """What stands in for driver.Launcher: launches here, and raises AssertionError on a fault."""

    def prepare(program: Program, device: Device) -> Callable[[Mapping[str, Tensor]], None]:
        bulk_copies = int(device.arch.removeprefix("sm_")) >= 90

        def launch(tensors: Mapping[str, Tensor]) -> None:
            run_program(program, tensors, bulk_copies=bulk_copies, **options).check()

        return launch

    return prepare


def run_orders(
    run: Callable[[int], Report], outputs: Mapping[str, Tensor], seeds: Sequence[int] = ORDERS
) -> Report:
    """`run(seed)` for each seed: all faults, and one for an output that isn't the same each time.

    outputs: what a run writes. The sites are the first run's.
    """
    reports = [run(seeds[0])]
    first = {name: _bits(tensor).clone() for name, tensor in outputs.items()}
    faults = dict.fromkeys(reports[0].faults)
    for seed in seeds[1:]:
        reports.append(run(seed))
        for fault in reports[-1].faults:
            if (fault.kind, fault.file, fault.line) not in {
                (old.kind, old.file, old.line) for old in faults
            }:
                faults[fault] = None
        for name, tensor in outputs.items():
            different = torch.nonzero(_bits(tensor) != first[name])
            if len(different) and not any(f.kind is Kind.ORDER_DEPENDENT for f in faults):
                faults[_order_fault(name, int(different[0]), seeds[0], seed)] = None
    return Report(tuple(faults), reports[0].sites)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _order_fault(name: str, byte: int, first: int, seed: int) -> Fault:
    message = f"byte {byte} of buffer {name} is another with seed {seed} than with seed {first}"
    return Fault(Kind.ORDER_DEPENDENT, message, "", 0, -1, (0, 0, 0))
