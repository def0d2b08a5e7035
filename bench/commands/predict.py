"""`vqbench predict`: what kernels should take on a GPU, by counts and rates; no GPU needed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from autotune.candidates import enumerate_space
from autotune.predict import best_configs, byte_floor, predict, predictable
from bench.options import cases
from bench.records import measurement_of, read_records
from bench.selection import Selection, matching_kernels
from bench.tables import OUTPUTS, render
from vqkernels.device import Device, detect, known_device
from vqkernels.errors import ConfigError, UnsupportedError
from vqkernels.kernel import Kernel
from vqkernels.parts import check_fit
from vqkernels.presets import parse_format
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config

__all__ = ["command"]

Row = dict[str, Any]

_COLUMNS = {
    "layer": "layer",
    "format": "format",
    "m": "m",
    "kernel": "kernel",
    "predicted_us": "predicted us",
    "binds": "binds",
    "floor_percent": "floor %",
    "dense_floor_us": "dense floor us",
    "config": "config",
}
_MEASURED = {"measured_us": "measured us", "ratio": "measured/predicted", "timer": "timer"}


@click.command("predict")
@cases
@click.option("--device", "name", required=True, help="h100, a100, ... of `list devices`; or cuda.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="float16", help="Of x.")
@click.option("--best", type=click.IntRange(1), help="So many configs that are predicted fastest.")
@click.option(
    "--records",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measurements to set beside; all of RESULTS/<device>/ if none is named.",
)
@click.option("--results", default="results", type=click.Path(path_type=Path), help="Folder.")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(
    workloads: tuple[str, ...],
    layers: tuple[str, ...],
    formats: tuple[str, ...],
    kernels: tuple[str, ...],
    ms: tuple[int, ...],
    name: str,
    dtype: Dtype,
    best: int | None,
    records: tuple[Path, ...],
    results: Path,
    output: str,
) -> None:
    """Predict the time of kernels on a GPU that need not be here; nothing is run or measured.

    Of each kernel its default config, or with --best those that are predicted to be fastest. floor
    %: the time in which memory could have moved the stored weight, x and y, as a share of the
    prediction. dense floor: the same of a dense weight in x's dtype, which no BLAS beats. Where the
    device has been measured, in the same config, the median stands beside.
    """
    device = detect(name) if name.startswith("cuda") else known_device(name)
    chosen = matching_kernels(kernels, device)
    measured = _measured(records or tuple(sorted((results / device.slug).glob("*.jsonl"))), device)
    rows: list[Row] = []
    refused: dict[str, int] = {}
    for layer, form, problem in _problems(workloads, layers, formats, ms, dtype, refused):
        for kernel in chosen:
            reason = predictable(kernel, device) or kernel.supports(problem, device)
            if reason is not None:
                line = f"{kernel.id}: {reason}"
                refused[line] = refused.get(line, 0) + 1
                continue
            case = _Case(layer, form, problem, kernel)
            rows += _rows(case, device, best, measured)
    columns = _COLUMNS | (_MEASURED if any(row["measured_us"] is not None for row in rows) else {})
    if output in ("table", "md"):
        click.echo(_title(device, dtype) + "\n")
    click.echo(render(rows, columns, output), nl=output != "jsonl")
    for line, count in refused.items():
        click.echo(f"{count} x {line}", err=True)


def _title(device: Device, dtype: str) -> str:
    return (
        f"Predicted, not measured: {device.name} ({device.arch}), {device.units} multiprocessors, "
        f"{dtype}"
    )


def _problems(
    workloads: Sequence[str],
    layers: Sequence[str],
    formats: Sequence[str],
    ms: Sequence[int],
    dtype: Dtype,
    refused: dict[str, int],
) -> Iterator[tuple[str, str, Problem]]:
    """Names of the layers, format and problem of each distinct product."""
    found: dict[tuple[str, Problem], list[str]] = {}
    for workload in workloads or ("llama2-7b",):
        selection = Selection(
            workload=workload,
            layers=tuple(layers) or ("*",),
            formats=tuple(formats) or ("aqlm-2x8",),
            ms=tuple(ms) or (1,),
        )
        for _, layer, form in selection.cases():
            spec = parse_format(form)
            try:
                check_fit(spec, layer.n, layer.k)
            except UnsupportedError as error:
                refused[f"{workload} {layer.name} {form}: {error}"] = 1
                continue
            for m in selection.ms:
                problem = Problem(m=m, n=layer.n, k=layer.k, spec=spec, dtype=dtype)
                found.setdefault((form, problem), []).append(layer.name)
    for (form, problem), names in found.items():
        yield "/".join(dict.fromkeys(names)), form, problem


@dataclasses.dataclass(frozen=True)
class _Case:
    """A kernel on a product, as the user named it."""

    layer: str
    form: str
    problem: Problem
    kernel: Kernel

    @property
    def key(self) -> tuple[Any, ...]:
        """What a record of it holds."""
        problem = self.problem
        return self.form, problem.n, problem.k, problem.m, problem.dtype, self.kernel.id


# By `_Case.key`: of each config and timer, the medians of all records.
_Medians = dict[tuple[Any, ...], dict[tuple[Config, str], list[float]]]


def _measured(paths: Sequence[Path], device: Device) -> _Medians:
    """What was measured on a device of this name, on cold weights, and passed its check."""
    found: _Medians = {}
    for path in paths:
        for record in read_records(path):
            if record["status"] != "ok" or record["device"]["name"] != device.name:
                continue
            timing = record["timing"]
            if timing["cache"]["codes"] != "cold":
                continue
            key = tuple(record[name] for name in ("format", "n", "k", "m", "dtype", "kernel"))
            by_config = found.setdefault(key, {})
            which = Config(**record["config"]), str(timing["timer"])
            by_config.setdefault(which, []).append(measurement_of(record).median_s)
    return found


def _rows(case: _Case, device: Device, best: int | None, measured: _Medians) -> Iterator[Row]:
    """A row for each config that was asked for, and for each one that was measured."""
    kernel, problem = case.kernel, case.problem
    if best is None:
        asked = [kernel.default(problem, device)]
    else:
        candidates = enumerate_space(kernel.space)
        asked = [config for config, _ in best_configs(kernel, candidates, problem, device, best)]
    medians = measured.get(case.key, {})
    known = [config for config, _ in medians if _valid(kernel, config)]
    for config in dict.fromkeys((*asked, *known)):
        row = _row(case, config, device)
        beside = {timer: values for (one, timer), values in medians.items() if one == config}
        if not beside:
            yield row
        for timer, values in beside.items():
            median = statistics.median(values)
            yield row | {
                "measured_us": median * 1e6,
                "ratio": median * 1e6 / row["predicted_us"],
                "timer": timer,
            }


def _valid(kernel: Kernel, config: Config) -> bool:
    """Whether the kernel still has a config that an older build measured."""
    try:
        kernel.space.check(config)
    except ConfigError:
        return False
    return True


def _row(case: _Case, config: Config, device: Device) -> Row:
    problem = case.problem
    found = predict(case.kernel, config, problem, device)
    dense = problem.n * problem.k * problem.torch_dtype.itemsize + problem.activation_bytes
    return {
        "device": device.name,
        "layer": case.layer,
        "n": problem.n,
        "k": problem.k,
        "format": case.form,
        "m": problem.m,
        "dtype": problem.dtype,
        "kernel": case.kernel.id,
        "predicted_us": found.seconds * 1e6,
        "binds": found.binds,
        "floor_percent": 100 * byte_floor(problem.bytes, device) / found.seconds,
        "dense_floor_us": byte_floor(dense, device) * 1e6,
        "config": " ".join(f"{name}={value}" for name, value in config.items()),
        "fixed_us": found.fixed_s * 1e6,
        **{f"{name}_us": seconds * 1e6 for name, seconds in found.by_resource.items()},
        "measured_us": None,
        "ratio": None,
        "timer": None,
    }
