"""Kernel: one implementation of an op, and the registry that finds them all.

A module under `vqkernels.kernels.<backend>` that ends in `KERNEL = Kernel(...)` is found by
scanning; other distributions name theirs under the entry point group `vqkernels.kernels`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vqkernels.device import Device
from vqkernels.errors import BackendError
from vqkernels.problem import Problem
from vqkernels.space import Config, Space
from vqkernels.tensor import QuantizedTensor
from vqkernels.work import Work

__all__ = ["Footprint", "Kernel", "Packed", "Registry", "Run", "find_kernel", "registry"]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A weight as one kernel wants it: named tensors, laid out for a config."""

    arrays: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def nbytes(self) -> int:
        """Bytes held by all arrays."""
        return sum(array.numel() * array.element_size() for array in self.arrays.values())

    def to(self, device: torch.device | str) -> Packed:
        """The arrays on `device`."""
        return Packed({name: array.to(device) for name, array in self.arrays.items()})

    def clone(self) -> Packed:
        """A copy in memory of its own, for rotating over cold weights."""
        return Packed({name: array.clone() for name, array in self.arrays.items()})


Run = Callable[[Packed, Tensor, Tensor], None]
"""A compiled kernel: `run(packed, x, out)` fills `out: [m, n]` from `x: [m, k]`."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a config needs and moves, known before it is compiled.

    weight_bytes: of the packed weight, all of it read once a call.
    workspace_bytes: allocated beside weight, x and y while a call runs.
    flops: operations it really does (tables do fewer than 2mnk).
    shared_bytes: on-chip memory of a block; 0 on a CPU.
    """

    weight_bytes: int
    workspace_bytes: int
    flops: int
    shared_bytes: int = 0


class Program(Protocol):
    """A device program with its constants, as a GPU kernel launches it."""

    def compile(self, arch: int) -> Any:
        """The compiler's result for `sm_<arch>`; needs no driver."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """One implementation of `op` on one backend; *what* it solves is a Problem, *how* a Config.

    supports: None, or the sentence that names the limit which rules the problem out.
    default: a valid config for a supported problem.
    pack: lay a tensor out for a config and a problem's dtype; the only step that may take long.
    compile: the callable for a config and problem; the first call may still warm caches.
    reads: `codes`, or `dense` for a baseline that holds the decoded weight.
    rounds_weights: the decoded weight passes through the problem's dtype before it is used, so
        that the oracle allows one more rounding a weight.
    half_chain: products that are summed in x's dtype before an fp32 sum takes them; 0: none.
    wide_vectors: takes vectors of several output features (`vector_width`). Of any other kernel
        `supports` refuses them, so that none has to know of them to be safe.
    packs_anywhere: `pack` takes a tensor on any device; one on the CPU otherwise.
    runs_on: kinds of device; a run that names no kernels takes those of its device.
    programs: of a GPU kernel, what a config launches, to be compiled on a machine without one.
    work: of a GPU kernel, the launches of a call in order, counted; None: no time is predicted.
    """

    name: str
    op: Literal["linear"]
    backend: str
    space: Space
    supports: Callable[[Problem, Device], str | None]
    default: Callable[[Problem, Device], Config]
    footprint: Callable[[Config, Problem, Device], Footprint]
    pack: Callable[[QuantizedTensor, Config, Problem], Packed]
    compile: Callable[[Config, Problem, Device], Run]
    about: str
    reads: Literal["codes", "dense"] = "codes"
    rounds_weights: bool = False
    half_chain: int = 0
    wide_vectors: bool = False
    packs_anywhere: bool = False
    runs_on: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    programs: Callable[[Config, Problem], tuple[Program, ...]] | None = None
    work: Callable[[Config, Problem, Device], tuple[Work, ...]] | None = None

    def __post_init__(self) -> None:
        if not self.wide_vectors:
            object.__setattr__(self, "supports", _refusing_wide(self.supports))

    @property
    def id(self) -> str:
        """`backend/name`, as the command line and the records write it."""
        return f"{self.backend}/{self.name}"

    def rounds_to(self, problem: Problem) -> str | None:
        """dtype that weights or products are rounded to before they are summed, if they are."""
        if self.rounds_weights or self.half_chain:
            return problem.dtype
        return problem.rounded_to

    @functools.cached_property
    def source_hash(self) -> str:
        """SHA-256 of the kernel's folder and of what surrounds every kernel.

        What a tuned config or a baseline is stamped with.
        """
        folder = Path(inspect.getfile(inspect.unwrap(self.supports))).parent
        digest = hashlib.sha256()
        around = Path(__file__).parent / "kernels"
        shared = (around / "linear.py", around / "layout.py")
        for path in (*sorted((*folder.glob("*.py"), *folder.rglob("*.cuh"))), *shared):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _refusing_wide(
    supports: Callable[[Problem, Device], str | None],
) -> Callable[[Problem, Device], str | None]:
    """`supports`, asked only about vectors of one output feature; still found by `unwrap`."""

    @functools.wraps(supports)
    def narrow(problem: Problem, device: Device) -> str | None:
        if problem.spec.vector_width > 1:
            return (
                f"vectors of {problem.spec.vector_width} rows: this kernel takes codes of a single "
                f"row; torch/dequant and numba/naive take these"
            )
        return supports(problem, device)

    return narrow


@dataclasses.dataclass(frozen=True)
class Registry:
    """All kernels that import here, by id, and why the other modules don't."""

    kernels: Mapping[str, Kernel]
    missing: Mapping[str, str]

    def __getitem__(self, kernel_id: str) -> Kernel:
        if kernel_id in self.kernels:
            return self.kernels[kernel_id]
        known = ", ".join(self.kernels)
        raise BackendError(f"kernel {kernel_id!r} is unknown or can't load; there are: {known}")


@functools.cache
def registry() -> Registry:
    """Scan the built-in backends and the entry points, once a process."""
    kernels: dict[str, Kernel] = {}
    missing: dict[str, str] = {}
    for name in _builtin_modules():
        try:
            found = importlib.import_module(name)
        except Exception as error:  # a broken backend may fail in any way, and is only absent
            missing[name.removeprefix("vqkernels.kernels.")] = f"{type(error).__name__}: {error}"
            continue
        if isinstance(kernel := getattr(found, "KERNEL", None), Kernel):
            kernels[kernel.id] = kernel
    for point in importlib.metadata.entry_points(group="vqkernels.kernels"):
        try:
            kernel = point.load()
        except Exception as error:  # someone else's package: any failure is theirs to explain
            missing[point.name] = f"{type(error).__name__}: {error}"
            continue
        if isinstance(kernel, Kernel):
            kernels[kernel.id] = kernel
        else:
            missing[point.name] = f"{point.value} is a {type(kernel).__name__}, not a Kernel"
    return Registry(MappingProxyType(kernels), MappingProxyType(missing))


def find_kernel(name: str) -> Kernel:
    """A kernel of the registry by id, or anyone's as `module:attribute`."""
    if ":" not in name:
        return registry()[name]
    module, _, attribute = name.partition(":")
    kernel: Kernel = getattr(importlib.import_module(module), attribute)
    return kernel


def _builtin_modules() -> list[str]:
    import vqkernels.kernels as root

    names = []
    for backend in pkgutil.iter_modules(root.__path__):
        if not backend.ispkg:
            continue
        folder = Path(root.__path__[0]) / backend.name
        names += [
            f"vqkernels.kernels.{backend.name}.{module.name}"
            for module in pkgutil.iter_modules([str(folder)])
        ]
    return names


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on, of the modules that are installed."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("numpy", "numba", "llvmlite", "triton", "cuda-core", "cuda-bindings", "aqlm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
