"""The work of what GPU kernels share: L1's room, torch's launches around a product, the BLAS."""

from __future__ import annotations

import math

from vqkernels.device import Device
from vqkernels.kernels import gathers, layout
from vqkernels.kernels.linear import core_shape
from vqkernels.problem import Problem
from vqkernels.work import Work

__all__ = [
    "after_spans",
    "dense_product",
    "elementwise",
    "l1_room",
    "memory_bytes",
    "streamed",
    "streamed_after_write",
    "surrounding",
]

# Where a device's own figure is unknown: the smallest L1 of sm_80 and newer.
_L1_BYTES = 128 << 10


def l1_room(device: Device, blocks: int, shared_bytes: int) -> int:
    """Bytes of L1 that the shared memory of the blocks on a multiprocessor leaves."""
    whole = device.multiprocessor.get("l1_bytes", _L1_BYTES)
    most = device.multiprocessor.get("shared_bytes", whole) // (shared_bytes + 1024)
    return whole - min(most, math.ceil(blocks / device.units)) * shared_bytes


def streamed(nbytes: int, passes: int, device: Device) -> int:
    """Bytes from main memory of what is read `passes` times, in order."""
    # an L2 is full at three quarters: other data, and hashed sets that fill up unevenly
    return nbytes if nbytes <= device.llc_bytes * 3 // 4 else nbytes * passes


def memory_bytes(
    problem: Problem, code_layout: str, passes: int, parts: int, device: Device
) -> int:
    """Bytes from and to main memory of a product that reads its codes `passes` times.

    parts: spans of k; the partial sums of several stay in the L2.
    """
    _, width = core_shape(problem.spec, problem.n, problem.k)
    codes = streamed(layout.codes_bytes(problem, code_layout), passes, device)
    y = problem.m * width * problem.torch_dtype.itemsize if parts == 1 else 0
    return codes + gathers.packed_books(problem) + gathers.inputs_bytes(problem) + y


def elementwise(read: int, written: int) -> Work:
    """A torch launch over so many bytes, which the L2 holds: 16 bytes a thread, 128 threads."""
    blocks = max(1, math.ceil(max(read, written) / (16 * 128)))
    warps = 4 * blocks
    return Work(
        hbm_bytes=0,
        l2_bytes=read + written,
        wavefronts=(read + written) / 128,
        instructions=40 * warps,
        blocks=blocks,
        warps=4,
        hbm_trips=0,
        l2_trips=2,
    )


def after_spans(problem: Problem, parts: int) -> tuple[Work, ...]:
    """Partial sums `[parts, m, width]` added up, and the copy of the sum into `out`."""
    if parts == 1:
        return ()
    _, width = core_shape(problem.spec, problem.n, problem.k)
    sums = 4 * problem.m * width
    y = problem.torch_dtype.itemsize * problem.m * width
    return elementwise(parts * sums, sums), elementwise(sums, y)


def surrounding(problem: Problem) -> tuple[Work, ...]:
    """What `linear.surround` launches before and after the core; nothing for a plain format."""
    spec, m = problem.spec, problem.m
    width_x, width_y = core_shape(spec, problem.n, problem.k)
    inside = spec.vector_axis == "in"
    features = problem.k - spec.side_columns if inside else problem.n
    cells = spec.stride > 1 or features != (width_x if inside else width_y)
    before = 2 * (spec.scale_axis == "column") + spec.permuted + bool(spec.side_columns)
    before += 3 * bool(spec.rotation_size) + 2 * (cells and inside)
    after = bool(spec.side_columns) + (spec.scale_axis in ("tensor", "row"))
    after += 3 * (spec.zero_axis == "column") + 4 * (spec.zero_axis in ("tensor", "row"))
    after += problem.bias + (cells and not inside)
    x, y = 4 * m * width_x, 4 * m * width_y
    launches = (elementwise(x, x),) * before + (elementwise(y, y),) * after
    # y in fp32 up to here, copied into `out`
    return (*launches, elementwise(y, y)) if launches else ()


def dense_product(problem: Problem, device: Device) -> tuple[Work, ...]:
    """The BLAS on a dense weight in x's dtype that was just written, and the copy into `out`."""
    width_x, width_y = core_shape(problem.spec, problem.n, problem.k)
    itemsize = problem.torch_dtype.itemsize
    weight = width_x * width_y * itemsize
    x, y = problem.m * width_x * itemsize, problem.m * width_y * itemsize
    tokens = -(-problem.m // 16) * 16  # an mma's tile
    flops = 2 * tokens * width_x * width_y
    # the BLAS chooses tiles and splits that fill the device; an mma is 4,096 operations
    product = Work(
        hbm_bytes=streamed_after_write(weight, device) + x + y,
        l2_bytes=weight + x + y,
        wavefronts=2 * weight / 128,
        instructions=3 * flops / 4096,
        tensor_flops=flops,
        tensor_dtype=problem.dtype,
        blocks=device.units,
        warps=4,
        hbm_trips=2,
    )
    return product, elementwise(y, y)


def streamed_after_write(nbytes: int, device: Device) -> int:
    """Bytes from main memory of what a launch just wrote: none where the L2 still holds it."""
    return max(0, nbytes - device.llc_bytes * 3 // 4)
