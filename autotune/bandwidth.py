"""The bandwidth of main memory as this machine reads it today, measured in the same run.

A data sheet's figure says little on a shared or throttled machine; a share of the bandwidth is
only honest against what a plain read reaches there and then.
"""

from __future__ import annotations

import dataclasses

import torch

from autotune.timers import Budget, take_samples
from vqkernels.device import Device

__all__ = ["Bandwidth", "measure_bandwidth"]


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Bytes a second: the median and the best of the samples, and what was read."""

    median: float
    best: float
    nbytes: int


def measure_bandwidth(device: Device) -> Bandwidth:
    """Read a buffer of 8 last-level caches (256 MiB at least) by the BLAS's matrix-vector product.

    A product with a matrix whose rows are long streams it once through every core; x and y are
    thousands of times smaller.
    """
    nbytes = min(max(8 * device.llc_bytes, 256 << 20), device.memory_bytes // 8)
    place = device.torch_name
    matrix = torch.ones(nbytes // (4 * 4096), 4096, device=place)
    x, y = torch.ones(4096, device=place), torch.empty(matrix.shape[0], device=place)
    budget = Budget(seconds=0.5, min_samples=5, max_samples=50)

    def read() -> None:
        torch.mv(matrix, x, out=y)

    moved = matrix.numel() * 4
    ordered = sorted(take_samples([read], device, budget, cold=True).seconds)
    return Bandwidth(moved / ordered[len(ordered) // 2], moved / ordered[0], moved)
