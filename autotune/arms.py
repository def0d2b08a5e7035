"""Arms from kernels: what may win a problem on a device, and what rules a config out unmeasured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autotune.bandwidth import Bandwidth
from autotune.candidates import enumerate_space
from autotune.tune import Arm
from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.problem import Problem
from vqkernels.space import Config

__all__ = ["arms", "pruning"]


def arms(
    kernels: Sequence[Kernel], problem: Problem, device: Device, bandwidth: Bandwidth | None
) -> list[Arm]:
    """An arm for every kernel that reads codes, runs on the device and takes the problem."""
    return [
        Arm(
            kernel.id,
            kernel.source_hash,
            enumerate_space(kernel.space),
            kernel.default(problem, device),
            pruning(kernel, problem, device, bandwidth),
        )
        for kernel in kernels
        if kernel.reads == "codes"
        and device.kind in kernel.runs_on
        and kernel.supports(problem, device) is None
    ]


def pruning(
    kernel: Kernel, problem: Problem, device: Device, bandwidth: Bandwidth | None
) -> Callable[[Config, float | None], str | None]:
    """What can't launch by its footprint, or can't be faster than the best by its bytes."""

    def prune(config: Config, best_s: float | None) -> str | None:
        try:
            declared = kernel.footprint(config, problem, device)
        except Exception as error:  # a config that its own kernel can't size is no candidate
            return f"footprint: {type(error).__name__}"
        if device.shared_bytes is not None and declared.shared_bytes > device.shared_bytes:
            return "more shared memory than a block has"
        if device.memory_bytes and declared.workspace_bytes > device.memory_bytes:
            return "more memory than the device has"
        # the whole weight has to come from memory, whatever the config
        floor = None if bandwidth is None else declared.weight_bytes / bandwidth.best
        if floor is not None and best_s is not None and floor > best_s:
            return "its bytes take longer than the best time"
        return None

    return prune
