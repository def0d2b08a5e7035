"""Arms from kernels: what may win a problem on a device, and what rules a config out unmeasured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autotune.bandwidth import Bandwidth
from autotune.candidates import Candidates, enumerate_space
from autotune.predict import best_configs, predict, predictable
from autotune.tune import Arm
from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.problem import Problem
from vqkernels.space import Config

__all__ = ["arms", "pruning"]

# Configs that are tried first, by their predicted time alone.
_FIRST = 2
# A config is given up unmeasured where its predicted time is so many times the best measured one.
# A prediction may be too high by what it assumes: rates up to 1.43 times below their peaks, counts
# of instructions that are right within a third, and twice the conflicts of an L1 whose banks nobody
# has described. 1.43 * 1.33 * 2 is 3.8.
_HOPELESS = 5.0


def arms(
    kernels: Sequence[Kernel], problem: Problem, device: Device, bandwidth: Bandwidth | None
) -> list[Arm]:
    """An arm for every kernel that reads codes, runs on the device and takes the problem."""
    return [
        _arm(kernel, enumerate_space(kernel.space), problem, device, bandwidth)
        for kernel in kernels
        if kernel.reads == "codes"
        and device.kind in kernel.runs_on
        and kernel.supports(problem, device) is None
    ]


def _arm(
    kernel: Kernel,
    candidates: Candidates,
    problem: Problem,
    device: Device,
    bandwidth: Bandwidth | None,
) -> Arm:
    return Arm(
        kernel.id,
        kernel.source_hash,
        candidates,
        kernel.default(problem, device),
        pruning(kernel, problem, device, bandwidth),
        _first(kernel, candidates, problem, device),
    )


def _first(
    kernel: Kernel, candidates: Candidates, problem: Problem, device: Device
) -> tuple[Config, ...]:
    """What is predicted to be fastest; nothing where no time is predicted."""
    if predictable(kernel, device) is not None:
        return ()
    try:
        best = best_configs(kernel, candidates, problem, device, _FIRST)
    except Exception:  # a kernel that can't count its work is searched without
        return ()
    return tuple(config for config, _ in best)


def pruning(
    kernel: Kernel, problem: Problem, device: Device, bandwidth: Bandwidth | None
) -> Callable[[Config, float | None], str | None]:
    """What can't launch by its footprint, or can't be faster than the best by its bytes.

    Or, where the kernel and the device tell, by its predicted time.
    """
    predicts = predictable(kernel, device) is None

    def hopeless(config: Config, best_s: float) -> bool:
        try:
            return predict(kernel, config, problem, device).seconds > _HOPELESS * best_s
        except Exception:  # a config that can't be counted may still be fast
            return False

    def prune(config: Config, best_s: float | None) -> str | None:
        # before the footprint, for which Triton compiles a config halfway
        if predicts and best_s is not None and hopeless(config, best_s):
            return f"predicted to take more than {_HOPELESS:g} times the best time"
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
