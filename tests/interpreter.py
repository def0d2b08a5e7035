"""Triton kernels run by Triton's interpreter, on CPU tensors.

`triton.jit` decides when it decorates whether a function is compiled or interpreted, Triton's own
library included, so the switch is in the environment before anything imports Triton: see
conftest.py. Tests that compile do so in a process of their own, without it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np
import torch

from vqkernels.device import Device, detect_cpu
from vqkernels.kernel import Kernel, registry

# What `supports` and `default` see: the interpreter stands for a GPU, a small one, so that
# defaults split k now and then.
DEVICE: Device = dataclasses.replace(
    detect_cpu(), kind="cuda", name="interpreter", arch="sm_90", units=4
)


def interpreted_kernels() -> dict[str, Kernel]:
    """Every Triton kernel by id."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "conftest.py sets it"
    _mend_bf16()
    return {name: k for name, k in registry().kernels.items() if k.backend == "triton"}


def compiling_environment() -> dict[str, str]:
    """The environment of a process in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@functools.cache
def _mend_bf16() -> None:
    """What Triton 3.7's interpreter gets wrong of bf16, which it keeps as uint16.

    Its `dot` multiplies those integers, and its conversion from fp32 truncates; GPUs round.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(builder, widened(a), widened(b), *rest)

    def cast_impl(builder: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
