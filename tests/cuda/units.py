"""Kernels to libraries: many of them in one translation unit, compiled by g++ once a session."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

__all__ = ["HERE", "KERNELS", "BuildError", "Program", "Source", "compile_unit", "runtime"]

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "vqkernels" / "kernels" / "cuda"

# -O1: -O0 compiles in half the time and runs three times slower. Hidden: the kernels of two units
# may have the same names.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fvisibility=hidden")
_INCLUDES = (f"-I{HERE / 'include'}", f"-I{KERNELS / 'include'}", f"-I{KERNELS}")
_RUNTIME_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w")


class BuildError(Exception):
    """The compiler refused a unit; its output is the message."""


class Program(Protocol):
    """What the launcher writes for a kernel (vqkernels.kernels.cuda.program)."""

    @property
    def kernel(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def writes(self) -> tuple[str, ...]: ...
    def declaration(self, entry: str = ...) -> str: ...
    def arguments(self, tensors: Mapping[str, Tensor]) -> ctypes.Structure: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Kernel text with a function `entry` of one argument; reports call the text `name`."""

    text: str
    entry: str
    name: str = "source"


def compile_unit(kernels: Sequence[Program | Source], *, bulk_copies: bool) -> ctypes.CDLL:
    """A library with a table `vq_kernels` of these. Raises BuildError."""
    runtime()
    flags = (*_FLAGS, *_INCLUDES, f"-DVQ_HAS_BULK_COPIES={int(bulk_copies)}")
    return ctypes.CDLL(str(_library(_text(kernels), flags)))


@functools.cache
def runtime() -> ctypes.CDLL:
    """The scheduler and the checks, one for all units of the process."""
    includes = (f"-I{HERE / 'include'}", f"-I{HERE / 'runtime'}")
    path = _library('#include "runtime.cpp"\n', (*_RUNTIME_FLAGS, *includes))
    return ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW)


def _text(kernels: Sequence[Program | Source]) -> str:
    """Headers once, then the kernels and a table of them."""
    sources = [kernel for kernel in kernels if isinstance(kernel, Source)]
    programs = {f"k{i}": k for i, k in enumerate(kernels) if not isinstance(k, Source)}
    headers = dict.fromkeys(program.kernel for program in programs.values())
    entries = [k.entry if isinstance(k, Source) else f"k{i}" for i, k in enumerate(kernels)]
    call = "[](const void* vq_argument) {{ vq::harness::invoke({}, vq_argument); }},"
    return "\n".join(
        (
            "#include <device.cuh>",
            *(f"#include <{header}.cuh>" for header in headers),
            *(program.declaration(entry=entry) for entry, program in programs.items()),
            *(f'#line 1 "{source.name}"\n{source.text}' for source in sources),
            'extern "C" VQ_EXPORTED const vq::harness::Kernel vq_kernels[] = {',
            *(call.format(entry) for entry in entries),
            "};\n",
        )
    )


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of what this process compiled; it goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="vq-harness-")


def _library(text: str, flags: Sequence[str]) -> Path:
    """The shared library of `text`, by its hash."""
    name = hashlib.sha256("\0".join((text, *flags)).encode()).hexdigest()[:24]
    source = Path(_folder().name) / f"{name}.cpp"
    target = source.with_suffix(".so")
    if not target.exists():
        source.write_text(text)
        command = ("g++", *flags, str(source), "-o", str(target))
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"{' '.join(command)}\n{result.stderr}")
    return target
