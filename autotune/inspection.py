"""What a kernel's programs become on an architecture, on a machine that has no GPU at all.

A program compiles to machine code through its own `compile`; what is read from it is the same for
every language it was written in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import time
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Literal

from autotune.cubin import Cubin, read_cubin
from vqkernels.device import Device
from vqkernels.errors import BackendError, VqError
from vqkernels.kernel import Kernel, Program
from vqkernels.problem import Problem
from vqkernels.space import Config

__all__ = ["ARCHS", "Inspection", "inspect_kernel", "stand_in"]


def _gpu(name: str, arch: str, units: int, l2_bytes: int, shared_bytes: int) -> Device:
    return Device(
        kind="cuda",
        name=name,
        arch=arch,
        units=units,
        llc_bytes=l2_bytes,
        memory_bytes=16 << 30,
        shared_bytes=shared_bytes,
    )


# One GPU of each architecture, for what `supports` and `default` ask: multiprocessors and L2 of
# the data sheets, shared memory a block of the CUDA C++ Programming Guide.
ARCHS = MappingProxyType(
    {
        gpu.arch: gpu
        for gpu in (
            _gpu("A100", "sm_80", 108, 40 << 20, 163 << 10),
            _gpu("RTX 3090", "sm_86", 82, 6 << 20, 99 << 10),
            _gpu("RTX 4090", "sm_89", 128, 72 << 20, 99 << 10),
            _gpu("H100", "sm_90", 132, 50 << 20, 227 << 10),
            _gpu("B200", "sm_100", 148, 126 << 20, 227 << 10),
            _gpu("RTX 5090", "sm_120", 170, 96 << 20, 99 << 10),
        )
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """One program of a config, compiled and read; or why there is none.

    status: ok; constraint (refused, outside the space, or more shared memory than a block of the
    architecture has: then not compiled where the footprint knows); compile (the compiler failed).
    reason: empty where ok. compiler: name and version of all compilers involved. shared_bytes:
    static and dynamic. code: None where nothing was compiled.
    """

    status: Literal["ok", "constraint", "compile"]
    config: Config | None = None
    reason: str = ""
    compiler: str = ""
    shared_bytes: int | None = None
    compile_s: float | None = None
    code: Cubin | None = None


def stand_in(arch: str) -> Device:
    """The GPU that stands for an architecture. Raises BackendError where none does."""
    if arch not in ARCHS:
        raise BackendError(f"architecture {arch!r} is unknown; use one of {', '.join(ARCHS)}")
    return ARCHS[arch]


def inspect_kernel(
    kernel: Kernel, problem: Problem, arch: str, config: Config | None = None
) -> Iterator[Inspection]:
    """Compile every program of a config (the default where None) and read it.

    Raises BackendError where the architecture is unknown or a tool is missing; a config that
    fails is a status.
    """
    device = stand_in(arch)
    if kernel.programs is None:
        yield Inspection(status="constraint", reason="launches no GPU program of its own")
        return
    if reason := kernel.supports(problem, device):
        yield Inspection(status="constraint", config=config, reason=reason)
        return
    chosen = kernel.default(problem, device) if config is None else config
    try:
        kernel.space.check(chosen)
    except VqError as error:
        yield Inspection(status="constraint", config=chosen, reason=str(error))
        return
    try:
        needed = kernel.footprint(chosen, problem, device).shared_bytes
        programs = kernel.programs(chosen, problem)
    except Exception as error:  # a kernel may fail in any way; the reason is kept
        yield Inspection(status="compile", config=chosen, reason=_cause(error))
        return
    if reason := _too_large(needed, device):
        yield Inspection(status="constraint", config=chosen, reason=reason, shared_bytes=needed)
        return
    for program in programs:
        yield _inspect(program, chosen, device)


def _inspect(program: Program, config: Config, device: Device) -> Inspection:
    start = time.perf_counter()
    try:
        # a compiler that fails may print the whole program
        with contextlib.redirect_stdout(io.StringIO()):
            compiled = program.compile(int(device.arch.removeprefix("sm_")))
    except Exception as error:  # a compiler may fail in any way; the reason is kept
        return Inspection(status="compile", config=config, reason=_cause(error))
    took = time.perf_counter() - start
    image, dynamic, compiler = _machine_code(compiled)
    code = read_cubin(image)
    shared = code.static_shared_bytes + dynamic
    reason = _too_large(shared, device)
    return Inspection(
        status="constraint" if reason else "ok",
        config=config,
        reason=reason,
        compiler=compiler,
        shared_bytes=shared,
        compile_s=took,
        code=code,
    )


def _too_large(shared: int, device: Device) -> str:
    """The sentence that refuses a block of `shared` bytes; empty where it fits."""
    if device.shared_bytes is None or shared <= device.shared_bytes:
        return ""
    return (
        f"needs {shared:,} bytes of shared memory a block; {device.arch} has "
        f"{device.shared_bytes:,}"
    )


def _machine_code(compiled: Any) -> tuple[bytes, int, str]:
    """Code, bytes of dynamic shared memory, compilers, of what a Program's `compile` returns.

    That is Triton's compiled kernel, or anything with these three as `cubin`, `shared_bytes` and
    `compiler`.
    """
    if not hasattr(compiled, "asm"):
        return compiled.cubin, compiled.shared_bytes, compiled.compiler
    # Triton runs a ptxas of its own for each generation
    from triton.backends.nvidia.compiler import get_ptxas_version

    metadata = compiled.metadata
    ptxas = re.search(r"\bV(\d[\d.]*)", get_ptxas_version(metadata.target.arch))
    compiler = f"triton {metadata.triton_version}, ptxas {ptxas[1] if ptxas else 'unknown'}"
    return compiled.asm["cubin"], metadata.shared, compiler


def _cause(error: BaseException) -> str:
    """What a chain of exceptions began with, in one line: where a text says error, if any does."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return f"{type(error).__name__}: {telling[-1] if telling else 'no message'}"
