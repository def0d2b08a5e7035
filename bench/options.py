"""What several commands ask alike: which cases, and on which device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from autotune.timers import set_threads
from vqkernels.device import Device, detect, detect_cpu

__all__ = ["cases", "named_device", "parse_size", "selecting", "usual_dtype", "where"]

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

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}b": (1024 if kind else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for kind in ("", "i")
}


def parse_size(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Bytes, as an option's callback: `2GB`, `1.5 GiB`, `500mb`, `1000000`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)", text.strip().lower())
    size = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise click.BadParameter(f"{text!r} is no size; write 2GB, 500MB or 1GiB", param=parameter)
    return size


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
