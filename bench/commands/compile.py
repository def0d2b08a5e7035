"""`vqbench compile`: registers, spills, shared memory and load widths, without a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import click

from autotune.inspection import Inspection, inspect_kernel, stand_in
from bench.selection import matching_kernels
from bench.tables import OUTPUTS, render
from bench.workload import parse_shape
from vqkernels.device import Device
from vqkernels.errors import BackendError, ConfigError
from vqkernels.kernel import Kernel
from vqkernels.parts import check_shape
from vqkernels.presets import parse_format
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config, Space

__all__ = ["command", "counted", "row"]

Row = dict[str, Any]

_COLUMNS = {
    "kernel": "kernel",
    "format": "format",
    "arch": "arch",
    "config": "config",
    "registers": "registers",
    "spill_bytes": "spilled B",
    "shared_bytes": "shared B",
    "global_loads": "loads of B",
    "shared_loads": "shared loads of B",
    "tensor": "tensor cores",
    "loop_instructions": "loop",
    "instructions": "all",
}


@click.command()
@click.argument("kernels", nargs=-1, metavar="[KERNEL]...")
@click.option("--arch", "archs", multiple=True, default=("sm_90",), help="sm_90; repeatable.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=("aqlm-2x8", "vptq-65536-256"),
    help="Format; repeatable.",
)
@click.option("-m", "m", type=click.IntRange(min=1), default=1, help="Tokens.")
@click.option("--shape", default="4096x4096", help="Layer, NxK.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="float16", help="Of x and y.")
@click.option(
    "--config",
    "changes",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="The default config with these values; repeatable, a row each.",
)
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    kernels: tuple[str, ...],
    archs: tuple[str, ...],
    formats: tuple[str, ...],
    m: int,
    shape: str,
    dtype: Dtype,
    changes: tuple[str, ...],
    output: str,
) -> None:
    """Compile KERNELs (globs such as 'triton/*'; all where none is given) and show what came out.

    Registers and spilled bytes are a thread's, shared bytes a block's. Loads, tensor-core
    instructions and `loop` are those of the hot loop: `16x50` is 50 loads of 16 bytes. Needs
    neither a GPU nor a driver. Exit code 1: something didn't compile.
    """
    devices = [stand_in(arch) for arch in dict.fromkeys(archs)]
    chosen = matching_kernels(kernels, devices[0])
    problems = _problems(formats, m, shape, dtype)
    _check_changes(chosen, changes)
    if any(k.backend == "triton" for k in chosen) and _interpreting():
        raise BackendError("TRITON_INTERPRET is set: Triton interprets then; unset it to compile")
    rows = list(_rows(chosen, problems, devices, changes))
    if output not in ("table", "md"):
        click.echo(render(rows, None, output).rstrip("\n"))
    else:
        compiled = [one for one in rows if one["registers"] is not None]
        if compiled:
            click.echo(render(compiled, _COLUMNS, output).strip("\n"))
        for line in _reasons(rows):
            click.echo(line)
    sys.exit(1 if any(one["status"] == "compile" for one in rows) else 0)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def _problems(formats: Sequence[str], m: int, shape: str, dtype: Dtype) -> dict[str, Problem]:
    """A problem a format. Raises SpecError for a shape that is none, or doesn't suit a format."""
    layer = parse_shape(shape)
    problems = {}
    for name in formats:
        spec = parse_format(name)
        check_shape(spec, layer.n, layer.k)
        problems[name] = Problem(m=m, n=layer.n, k=layer.k, spec=spec, dtype=dtype)
    return problems


def _check_changes(kernels: Sequence[Kernel], changes: Sequence[str]) -> None:
    """Raise ConfigError for a change that no chosen kernel knows."""
    for change in changes:
        errors = []
        for kernel in kernels:
            try:
                _parse(change, kernel.space)
            except ConfigError as error:
                errors.append(error)
        if len(errors) == len(kernels):
            raise errors[-1]


def _parse(change: str, space: Space) -> dict[str, int | str | bool]:
    """The values of `key=value,...`, as the space has them."""
    params = {param.name: param for param in space.params}
    values: dict[str, int | str | bool] = {}
    for pair in change.split(","):
        name, given, text = pair.strip().partition("=")
        if not given:
            raise ConfigError(f"config {pair!r}: write key=value[,key=value...]")
        if name not in params:
            raise ConfigError(f"config: no parameter {name!r}; there are {sorted(params)}")
        allowed = {str(value): value for value in params[name].values}
        if text not in allowed:
            raise ConfigError(f"config: {name}={text} is not one of {tuple(allowed)}")
        values[name] = allowed[text]
    return values


def _rows(
    kernels: Sequence[Kernel],
    problems: Mapping[str, Problem],
    devices: Sequence[Device],
    changes: Sequence[str],
) -> Iterator[Row]:
    for kernel in kernels:
        for name, problem in problems.items():
            for device in devices:
                for change in changes or ("",):
                    for one in _inspect(kernel, problem, device, change):
                        yield row(kernel, name, problem, device.arch, one)


def _inspect(kernel: Kernel, problem: Problem, device: Device, change: str) -> Iterator[Inspection]:
    config = None
    if change and kernel.programs is not None and kernel.supports(problem, device) is None:
        try:
            config = kernel.default(problem, device).replace(**_parse(change, kernel.space))
        except ConfigError as error:
            yield Inspection(status="constraint", reason=str(error))
            return
    yield from inspect_kernel(kernel, problem, device.arch, config)


def row(kernel: Kernel, name: str, problem: Problem, arch: str, one: Inspection) -> Row:
    """An inspection of `kernel` on a format by `name`, flat; None for what isn't known."""
    code = one.code
    return {
        "kernel": kernel.id,
        "format": name,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "dtype": problem.dtype,
        "arch": arch,
        "config": _config_text(one.config),
        "status": one.status,
        "reason": one.reason,
        "compiler": one.compiler or None,
        "program": code and code.function,
        "registers": code and code.registers,
        "stack_bytes": code and code.stack_bytes,
        "spill_store_bytes": code and code.spill_store_bytes,
        "spill_load_bytes": code and code.spill_load_bytes,
        "spill_bytes": code and code.spill_bytes,
        "shared_bytes": one.shared_bytes,
        "global_loads": code and counted(code.loop.global_loads),
        "shared_loads": code and counted(code.loop.shared_loads),
        "tensor": code and counted(code.loop.tensor),
        "loop_instructions": code and code.loop.instructions,
        "instructions": code and code.instructions,
        "compile_s": one.compile_s,
    }


def counted(counts: Mapping[Any, int]) -> str:
    """`16x50 4x1`: what, and how often; the largest first."""
    return " ".join(f"{what}x{counts[what]}" for what in sorted(counts, reverse=True)) or "-"


def _config_text(config: Config | None) -> str | None:
    if config is None:
        return None
    return " ".join(f"{name}={value}" for name, value in config.items())


def _reasons(rows: Sequence[Row]) -> list[str]:
    """A line for each thing that has a reason, however many architectures share it."""
    lines: dict[str, list[str]] = {}
    for one in rows:
        if not one["reason"]:
            continue
        subject = one["kernel"]
        if one["config"] is not None or "GPU program" not in one["reason"]:
            subject += f", {one['format']}"
        if one["status"] == "compile":
            subject += f", {one['config']}: does not compile"
        elif one["shared_bytes"] is not None:
            subject += f", {one['config']}"
        archs = lines.setdefault(f"{subject}: {one['reason']}", [])
        if one["arch"] not in archs:
            archs.append(one["arch"])
    several = len({one["arch"] for one in rows}) > 1
    return [f"! {line}" + (f" ({', '.join(a)})" if several else "") for line, a in lines.items()]
