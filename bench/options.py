"""What several commands ask alike: which cases, and on which device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from autotune.timers import set_threads
from vqkernels.device import Device, detect, detect_cpu

__all__ = ["cases", "named_device", "selecting", "usual_dtype", "where"]

F = TypeVar("F", bound=Callable[..., Any])

_CASES = (
    click.option("-w", "--workload", "workloads", multiple=True, help="Name, or a .toml file."),
    click.option("-l", "--layer", "layers", multiple=True, help="Layers by glob, e.g. '*.query'."),
    click.option("--fuse", is_flag=True, help="Layers of one input as one: qkv_proj, ..."),
    click.option("-f", "--format", "formats", multiple=True, help="Format, e.g. rq-2x256x8."),
    click.option("-k", "--kernel", "kernels", multiple=True, help="Kernels by glob: 'numba/*'."),
    click.option(
        "-m", "ms", multiple=True, type=click.IntRange(1), help="Tokens; repeat for several."
    ),
)
_WHERE = (
    click.option("--device", default="auto", help="cpu, cuda, cuda:N, or the GPU if there is one."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads; all that may run here."),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Activations."
    ),
)


def cases(command: F) -> F:
    """Options that select cases and kernels."""
    for option in reversed(_CASES):
        command = option(command)
    return command


def selecting(command: F) -> F:
    """Options that select cases, kernels and the device, in this order."""
    for option in reversed(_WHERE):
        command = option(command)
    return cases(command)


def named_device(device: str, threads: int | None) -> Device:
    """The device that the options name: a CPU with that many threads, or a GPU."""
    found = detect(device)
    return detect_cpu(threads) if found.kind == "cpu" else found


def where(device: str, threads: int | None) -> Device:
    """The device that the options name; on a CPU this process then uses that many threads."""
    found = named_device(device, threads)
    if found.kind == "cpu":
        set_threads(found.units)
    return found


def usual_dtype(device: Device) -> str:
    """Of activations, where nobody asks for another: what the device's kernels are made for."""
    return "float32" if device.kind == "cpu" else "float16"
