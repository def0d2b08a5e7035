"""Triton kernels run by Triton's interpreter, on CPU tensors.

`triton.jit` decides when it decorates whether a function is compiled or interpreted, Triton's own
library included, so the switch is in the environment before anything imports Triton: see
conftest.py. Tests that compile do so in a process of their own, without it.
"""

from __future__ import annotations

import dataclasses
import os

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
    return {name: k for name, k in registry().kernels.items() if k.backend == "triton"}


def compiling_environment() -> dict[str, str]:
    """The environment of a process in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
