"""A step of a call, compiled and packed, and what ends an attempt at it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from autotune.measurement import Status
from autotune.subject import Buffer, Subject
from vqkernels.errors import VqError
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.space import Config
from vqkernels.tensor import QuantizedTensor

__all__ = ["EndError", "Made", "Step", "guarded", "make", "wait"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Step:
    """One product of a call: a kernel on a subject, in a config (its default where None)."""

    kernel: Kernel
    subject: Subject
    config: Config | None = None


@dataclasses.dataclass
class EndError(Exception):
    """Ends an attempt with a status and a reason."""

    status: Status
    reason: str


@dataclasses.dataclass(frozen=True)
class Made:
    """A step that is compiled and packed."""

    kernel: Kernel
    subject: Subject
    config: Config
    run: Run
    packed: Packed
    declared: Footprint
    compile_s: float

    @property
    def place(self) -> str:
        """Where its arrays are, as torch names it."""
        return self.subject.place

    def call(self, x: Tensor, out: Tensor, weight: Packed | None = None) -> None:
        """Run to the end, on its own weight or another; what fails in any way is a status."""

        def done() -> None:
            self.run(weight or self.packed, x, out)
            wait(self.place)

        guarded(done, "runtime")

    def pack(self, tensor: QuantizedTensor) -> Packed:
        """Another weight, laid out as its own is, in memory that nothing else holds."""

        def build() -> Packed:
            packed = self.kernel.pack(tensor, self.config, self.subject.problem)
            return packed.to(self.place).clone()

        return guarded(build, "compile")

    def buffer(self) -> Buffer:
        """An output of its own."""
        return Buffer.make(self.subject.problem, self.place)


def make(step: Step) -> Made:
    """Compile and pack, once the config is known to fit the device."""
    kernel, subject = step.kernel, step.subject
    config, declared = _choose(step)

    def build() -> tuple[Run, Packed]:
        packed = kernel.pack(subject.source(kernel), config, subject.problem).to(subject.place)
        return kernel.compile(config, subject.problem, subject.device), packed

    start = time.perf_counter()
    run, packed = guarded(build, "compile")
    took = time.perf_counter() - start
    if packed.nbytes > declared.weight_bytes:
        raise EndError(
            "incorrect",
            f"packs {packed.nbytes:,} bytes but declares {declared.weight_bytes:,}",
        )
    # a copy: what was packed may share memory with the subject, which other kernels are held to
    return Made(kernel, subject, config, run, packed.clone(), declared, took)


def _choose(step: Step) -> tuple[Config, Footprint]:
    kernel, problem, device = step.kernel, step.subject.problem, step.subject.device
    if reason := guarded(lambda: kernel.supports(problem, device), "compile"):
        raise EndError("constraint", reason)
    chosen = step.config
    if chosen is None:
        chosen = guarded(lambda: kernel.default(problem, device), "compile")
    try:
        kernel.space.check(chosen)
    except VqError as error:
        raise EndError("constraint", str(error)) from error
    declared = guarded(lambda: kernel.footprint(chosen, problem, device), "compile")
    if device.shared_bytes is not None and declared.shared_bytes > device.shared_bytes:
        raise EndError(
            "constraint",
            f"needs {declared.shared_bytes:,} bytes of shared memory a block; "
            f"{device.name} has {device.shared_bytes:,}",
        )
    return chosen, declared


def guarded(action: Callable[[], T], status: Status) -> T:
    """What `action` gives; any failure of it ends the attempt with `status`."""
    try:
        return action()
    except EndError:
        raise
    except Exception as error:  # a kernel may fail in any way; the reason is kept
        line = str(error).strip().splitlines()
        first = line[0] if line else "no message"
        raise EndError(status, f"{type(error).__name__}: {first}") from error


def wait(place: str) -> None:
    """Until a GPU has done all that was queued, on any stream."""
    if place != "cpu":
        torch.cuda.synchronize(place)
