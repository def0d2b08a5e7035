"""A kernel whose configs do everything that a config may do wrong, for the tuner to survive."""

from __future__ import annotations

import ctypes
import itertools
import os
import time

import torch

from vqkernels.kernel import Footprint, Kernel, Packed
from vqkernels.kernels.torch import dequant
from vqkernels.space import Config, Constraint, Param, Space

FAULTS = (
    "none",
    "segfault",
    "hang in compile",
    "hang in launch",
    "out of memory",
    "wrong",
    "unwritten tail",
    "nan",
    "exception",
    "nondeterministic",
    "exit",
)
# A right config's extra milliseconds: the fastest has to be found among the faults.
SPACE = Space(
    params=(
        Param("fault", FAULTS, "what goes wrong"),
        Param("delay_ms", (40, 20, 10), "slept in a call"),
    ),
    constraints=(
        Constraint(
            "each fault once", lambda c: c.text("fault") == "none" or c.number("delay_ms") == 10
        ),
    ),
)


def compile(config, problem, device):
    fault, delay = config["fault"], config["delay_ms"] / 1000
    if fault == "hang in compile":
        time.sleep(600)
    honest = dequant.compile(Config(), problem, device)
    before, after = BEFORE.get(fault, lambda: None), AFTER.get(fault, lambda out: None)

    def run(packed, x, out) -> None:
        time.sleep(delay)
        before()
        honest(packed, x, out)
        after(out)

    return run


CALLS = itertools.count()


def fail() -> None:
    raise ValueError("said by the kernel")


def jitter(out) -> None:
    """Within the bound: only the bits differ, from one call to the next."""
    out[0, 0] *= 1 + 1e-6 * (next(CALLS) % 2)


BEFORE = {
    "segfault": lambda: ctypes.string_at(0),
    "hang in launch": lambda: time.sleep(600),
    "out of memory": lambda: torch.empty(1 << 50, dtype=torch.uint8),
    "exception": fail,
    "exit": lambda: os._exit(0),
}
AFTER = {
    "wrong": lambda out: out.add_(1),
    "unwritten tail": lambda out: out[:, -1].fill_(float("nan")),
    "nan": lambda out: out.fill_(float("nan")),
    "nondeterministic": jitter,
}


def footprint(config, problem, device) -> Footprint:
    return dequant.footprint(Config(), problem, device)


def pack(tensor, config, problem) -> Packed:
    return dequant.pack(tensor, Config(), problem)


KERNEL = Kernel(
    name="faulty",
    op="linear",
    backend="test",
    space=SPACE,
    supports=lambda problem, device: None,
    default=lambda problem, device: Config(fault="none", delay_ms=40),
    footprint=footprint,
    pack=pack,
    compile=compile,
    about="for the tuner's tests",
)
