"""`vqbench list`: kernels, formats, workloads and devices, and why something can't be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.available import first_line, install_hint, preset_refusals
from bench.peers import peers
from bench.tables import OUTPUTS, render
from bench.weights import weights_file
from bench.workload import Workload, load_workload, workload_names
from vqkernels.device import Device, detect, detect_cpu, detect_gpus, known_devices
from vqkernels.errors import BackendError
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import PRESETS
from vqkernels.spec import CodebookSpec

__all__ = ["SIZED_NAMES", "command"]

Row = dict[str, Any]

# What `parse_format` accepts for any sizes; the words in capitals stand for numbers.
SIZED_NAMES = (
    "vq-ENTRIESxLENGTH",
    "pq-mSUBSPACES",
    "rq-STAGESxENTRIESxLENGTH",
    "aqlm-STAGESxBITS",
    "vptq-MAIN-RESIDUAL",
)


@click.command("list")
@click.argument(
    "topic", required=False, type=click.Choice(["kernels", "formats", "workloads", "devices"])
)
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(topic: str | None, output: str) -> None:
    """Kernels, formats, workloads and devices (TOPIC, or all), with the reason where one can't run.

    JSON of all topics is one object by topic; CSV and JSONL take one topic.
    """
    if topic is not None:
        _print(topic, output)
        return
    if output == "json":
        click.echo(json.dumps({name: rows() for name, (rows, _) in _TOPICS.items()}, indent=2))
        return
    if output not in ("table", "md"):
        raise click.UsageError(f"{output} holds one topic: name kernels, formats or another")
    for name in _TOPICS:
        click.echo(f"## {name}\n" if output == "md" else name)
        _print(name, output)
        click.echo()


def _print(topic: str, output: str) -> None:
    """A topic's rows; under a table for people, why something can't be used."""
    make, columns = _TOPICS[topic]
    rows = make()
    click.echo(render(rows, columns, output).strip("\n"))
    if output in ("table", "md"):
        for row in rows:
            if row.get("reason"):
                click.echo(f"\n! {row[next(iter(columns))]}: {row['reason']}")


# ------------------------------------------------------------------------------------------------
# kernels


def _kernels() -> list[Row]:
    """A row a kernel, the peers' last; and one for a backend's modules that don't import."""
    device, found = detect(), registry()
    rows = [_kernel(kernel, device) for kernel in found.kernels.values()]
    rows += [_kernel(kernel, device) for kernel in peers().values()]
    groups: dict[tuple[str, str], int] = {}
    for name, reason in found.missing.items():
        key = (name.partition(".")[0], reason)
        groups[key] = groups.get(key, 0) + 1
    for (backend, reason), count in groups.items():
        fix = install_hint(reason)
        rows.append(
            {
                "kernel": f"{backend}/*",
                "about": f"{count} modules that don't import",
                "peer": False,
                "reads": None,
                "tunables": None,
                "formats": None,
                "runs": False,
                "reason": f"{reason}; run: {fix}" if fix else reason,
            }
        )
    return rows


def _kernel(kernel: Kernel, device: Device) -> Row:
    """What `kernel` is, and of how many presets it takes; a reason where that is none."""
    reasons = preset_refusals(kernel, device)
    taken = sum(reason is None for reason in reasons)
    return {
        "kernel": kernel.id,
        "about": kernel.about,
        "peer": kernel.id in peers(),
        "reads": kernel.reads,
        "tunables": len(kernel.space.params),
        "formats": f"{taken}/{len(reasons)}",
        "runs": taken > 0,
        "reason": "" if taken else f"{device.name}: {reasons[0]}",
    }


# ------------------------------------------------------------------------------------------------
# formats


def _formats() -> list[Row]:
    return [_format(name, spec) for name, spec in PRESETS.items()]


def _format(name: str, spec: CodebookSpec) -> Row:
    return {
        "format": name,
        "method": spec.method,
        "stages": " + ".join(str(entries) for entries in spec.stages),
        "vector_length": spec.vector_length,
        "vector_width": spec.vector_width,
        "vector_axis": spec.vector_axis,
        "subspaces": spec.subspaces,
        "codebooks": "tensor" if not spec.group_size else f"{spec.group_size} {spec.group_axis}",
        "index_bits": spec.vector_bits / spec.vector_size,
        "sized_name": _sized_name(name),
    }


def _sized_name(name: str) -> str | None:
    """The pattern that `name` is one case of."""
    for sized in SIZED_NAMES:
        if re.fullmatch(re.sub("[A-Z]+", r"\\d+", sized), name):
            return sized
    return None


# ------------------------------------------------------------------------------------------------
# workloads and devices


def _workloads() -> list[Row]:
    return [_workload(load_workload(name)) for name in workload_names()]


def _workload(workload: Workload) -> Row:
    weights, reason = _weights(workload)
    return {
        "workload": workload.name,
        "about": workload.about,
        "blocks": workload.blocks,
        "layers": len(workload.layers),
        "parameters": workload.blocks * sum(layer.n * layer.k for layer in workload.layers),
        "weights": weights,
        "runs": not reason,
        "reason": reason,
    }


def _weights(workload: Workload) -> tuple[str, str]:
    """Where the weights come from, and what is in the way."""
    if workload.package is None:
        return "made at random", ""
    source = f"real: {workload.package.replace('_', '-')}"
    try:
        path = weights_file(workload)
    except BackendError as error:
        return source, str(error)
    except Exception as error:  # a package that is half there
        return source, f"{first_line(error)}; run: {install_hint(repr(workload.package))}"
    if isinstance(path, Path) and not path.is_file():
        return source, f"{path} is missing; install the package again"
    return source, ""


def _devices() -> list[Row]:
    """This machine's CPU and GPUs, then the devices whose peaks are known."""
    gpus, known = detect_gpus(), known_devices()
    rows = [_detected(device) for device in (detect_cpu(), *gpus)]
    for name, facts in known.items():
        rows.append(
            {
                "device": name,
                "here": any(re.search(facts["match"], gpu.name) for gpu in gpus),
                "name": facts["match"],
                "units": facts.get("multiprocessors"),
                "llc_bytes": facts.get("l2_bytes"),
                "bandwidth_gb_s": _giga(facts.get("bandwidth")),
                "source": "devices/*.toml",
            }
        )
    return rows


def _detected(device: Device) -> Row:
    return {
        "device": "cpu" if device.kind == "cpu" else f"cuda:{device.index}",
        "here": True,
        "name": f"{device.name} {device.arch}",
        "units": device.units,
        "llc_bytes": device.llc_bytes,
        "bandwidth_gb_s": _giga(device.bandwidth),
        "source": "detected",
    }


def _giga(rate: float | None) -> float | None:
    return None if rate is None else rate / 1e9


_TOPICS: dict[str, tuple[Callable[[], list[Row]], dict[str, str]]] = {
    "kernels": (
        _kernels,
        {
            "kernel": "kernel",
            "reads": "reads",
            "tunables": "tunables",
            "formats": "presets",
            "runs": "runs here",
            "peer": "peer",
            "about": "about",
        },
    ),
    "formats": (
        _formats,
        {
            "format": "format",
            "method": "method",
            "stages": "entries",
            "vector_length": "length",
            "vector_axis": "along",
            "subspaces": "subspaces",
            "codebooks": "a codebook for each",
            "index_bits": "index bits/weight",
            "sized_name": "any size",
        },
    ),
    "workloads": (
        _workloads,
        {
            "workload": "workload",
            "blocks": "blocks",
            "layers": "layers",
            "parameters": "parameters",
            "weights": "weights",
            "about": "about",
        },
    ),
    "devices": (
        _devices,
        {
            "device": "device",
            "here": "here",
            "name": "name or pattern",
            "units": "units",
            "llc_bytes": "last-level cache B",
            "bandwidth_gb_s": "peak GB/s",
            "source": "source",
        },
    ),
}
