"""`vqbench quantize`: the linear layers of a checkpoint, as a container."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bench.tables import render
from vqkernels import container
from vqkernels.container import entropy
from vqkernels.container.manifest import Coding, check_name
from vqkernels.container.origin import Made, library_stamp
from vqkernels.errors import ContainerError, TensorError, UnsupportedError
from vqkernels.parts import BitCount, check_fit, effective_bits
from vqkernels.presets import parse_format
from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["command"]

Row = dict[str, Any]

# Weights whose numbers are the weights; FP8 and integer ones need scales from elsewhere.
_DTYPES = ("F64", "F32", "F16", "BF16")

# Tables that are looked up, and gains: no matrix product, so nothing for our kernels.
_NOT_LINEAR = ("embed", "norm")

_MAX_SEED = (1 << 63) - 1  # what a container's metadata holds

_COLUMNS = {
    "layer": "layer",
    "shape": "n x k",
    "status": "status",
    "bits": "bits/weight",
    "error": "relative error",
    "seconds": "seconds",
}


@dataclasses.dataclass(frozen=True)
class _Job:
    """What to do with every layer."""

    spec: CodebookSpec
    seed: int
    iterations: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Names of the tensors to quantise, and of the others by why not."""

    names: tuple[str, ...]
    skipped: dict[str, list[str]]


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-f", "--format", "format_name", required=True, help="Format, e.g. rq-2x256x8.")
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path))
@click.option("-l", "--layer", "patterns", multiple=True, help="Tensors by glob, e.g. '*.query.*'.")
@click.option("--bias", is_flag=True, help="Keep each layer's bias beside its weight.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, _MAX_SEED), help="Of k-means."
)
@click.option("--iterations", default=25, show_default=True, type=click.IntRange(1))
@click.option("--name", help="Of the file, instead of MODEL.FORMAT.")
@click.option("--author", help="Who makes it, for the file's provenance.")
@click.option(
    "--codes",
    type=click.Choice(["packed", "ans"]),
    default="packed",
    show_default=True,
    help="ans: entropy-code what gets smaller so (needs vqbench[entropy]).",
)
def command(
    model: Path,
    format_name: str,
    folder: Path,
    patterns: tuple[str, ...],
    bias: bool,
    seed: int,
    iterations: int,
    name: str | None,
    author: str | None,
    codes: Coding,
) -> None:
    """Quantise the linear layers of MODEL (a .safetensors file) into one container.

    It is written as FOLDER/MODEL.FORMAT.vq.safetensors, whole or not at all. Unasked: every
    matrix called *.weight that is no embedding and no norm; with --layer: every matrix that
    matches. A layer that can't hold the format is refused and left out.
    """
    job = _Job(parse_format(format_name), seed, iterations, bias)
    label = Path(format_name).stem if format_name.endswith(".toml") else format_name
    target = _target(folder, name or f"{model.stem}.{label}", model)
    if codes == "ans":
        entropy.require()
    try:
        with _opened(model) as file:
            choice = _choose(file, model, job, patterns)
            _check_weights(file, model, choice.names)
            _check_space(file, folder, choice.names, job.spec)
            provenance = _provenance(model, label, job, author)
            tensors, rows = _quantize_all(file, model, choice.names, job)
        if tensors:
            folder.mkdir(parents=True, exist_ok=True)
            made = {row["layer"]: _made(row, job) for row in rows if row["layer"] in tensors}
            container.save(target, tensors, provenance=provenance, made=made, codes=codes)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {target} was not written", err=True)
        sys.exit(130)
    except OSError as error:
        raise ContainerError(
            f"{error.filename or folder}: {error.strerror or error}; choose another folder"
        ) from error
    _report(rows, choice, target if tensors else None)
    sys.exit(0 if tensors else 1)


# ------------------------------------------------------------------------------------------------
# where from, where to


@contextlib.contextmanager
def _opened(model: Path) -> Iterator[Any]:
    """The open safetensors file; whatever is wrong with it is a ContainerError that names it."""
    if not model.is_file():
        problem = "is not a file" if model.exists() else "there is no such file"
        raise ContainerError(f"{model}: {problem}; give the path of a .safetensors file")
    try:
        with safe_open(model, framework="pt") as file:
            yield file
    except SafetensorError as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ContainerError(f"{model}: {_not_safetensors(model)} ({line})") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ContainerError(
            f"{error.filename or model}: can't be read ({reason}); check the path and its mode"
        ) from error


def _not_safetensors(model: Path) -> str:
    with model.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return (
            "is a zip or pickle file, which vqbench never loads; "
            "convert it with safetensors.torch.save_file"
        )
    return "is truncated, damaged or no safetensors file; copy or download it again"


def _target(folder: Path, name: str, model: Path) -> Path:
    """The file to write; refused early where that can't work, before hours are spent."""
    if Path(name).name != name or not name.isprintable():
        raise click.BadParameter(f"{name!r} is no file name", param_hint="--name")
    target = folder / f"{name}.vq.safetensors"
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ContainerError(f"{there}: is a file; name a folder for the output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ContainerError(f"{there}: can't be written to; choose another folder")
    if target.exists() and model.exists() and target.samefile(model):
        raise ContainerError(f"{target}: is the model itself; choose another --name or folder")
    return target


def _check_space(file: Any, folder: Path, names: Sequence[str], spec: CodebookSpec) -> None:
    """Raise ContainerError where the disk is too small for what fits the format."""
    bits = BitCount()
    for name in names:
        n, k = file.get_slice(name).get_shape()
        with contextlib.suppress(UnsupportedError):
            check_fit(spec, n, k)
            bits += effective_bits([(spec, n, k)])
    need = (bits.index + bits.codebook + bits.side) // 8
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    have = shutil.disk_usage(there).free
    if need > have:
        raise ContainerError(
            f"{there}: needs {need:,} bytes, but its disk has {have:,} left; free some space or "
            f"choose another disk"
        )


def _provenance(model: Path, label: str, job: _Job, author: str | None) -> dict[str, str]:
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "source": model.name,
        "source_sha256": digest,
        "format": label,
        "method": job.spec.method,
        "seed": str(job.seed),
        "iterations": str(job.iterations),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": library_stamp(),
        **({"author": author} if author else {}),
    }


# ------------------------------------------------------------------------------------------------
# which tensors


def _choose(file: Any, model: Path, job: _Job, patterns: Sequence[str]) -> _Choice:
    """Tensors to quantise; ContainerError where there is none."""
    names, skipped = [], dict[str, list[str]]()
    for name in file.keys():  # noqa: SIM118  # a safetensors file is no dict
        if patterns and not any(fnmatch.fnmatchcase(name, glob) for glob in patterns):
            continue
        reason = _unfit(file, name) or ("" if patterns else _unasked(file, name, job.spec))
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            names.append(name)
    if not names:
        what = f"matches {' '.join(patterns)}" if patterns else "is the weight of a linear layer"
        reasons = "; ".join(f"{len(found)} {reason}" for reason, found in skipped.items())
        raise ContainerError(
            f"{model}: no tensor {what} ({reasons or 'nothing has that name'}); "
            f"name tensors with --layer"
        )
    for name in names:
        try:
            check_name(name)
        except ContainerError as error:
            raise ContainerError(f"{model}: {error}") from error
    return _Choice(tuple(names), skipped)


def _unfit(file: Any, name: str) -> str:
    """Why a tensor is no matrix that can be quantised, or nothing."""
    part = file.get_slice(name)
    if len(part.get_shape()) != 2:
        return "not a matrix"
    if part.get_dtype() not in _DTYPES:
        return f"of dtype {part.get_dtype()}, not {', '.join(_DTYPES)}"
    return ""


def _unasked(file: Any, name: str, spec: CodebookSpec) -> str:
    """Why a matrix isn't taken unless it is asked for by name, or nothing."""
    if name.rpartition(".")[2] != "weight":
        return "not called *.weight"
    if word := next((word for word in _NOT_LINEAR if word in name.lower()), None):
        return f"with {word!r} in the name"
    if min(file.get_slice(name).get_shape()) < spec.vector_length:
        return f"smaller than a vector of {spec.vector_length}"
    return ""


def _check_weights(file: Any, model: Path, names: Sequence[str]) -> None:
    """Raise TensorError for NaN and infinity: all layers first, as one may come after hours."""
    for name in names:
        if not bool(torch.isfinite(file.get_tensor(name).float()).all()):
            raise TensorError(
                f"{model}: tensor {name!r} holds NaN or infinity (as float32); repair the "
                f"checkpoint, or leave the layer out with --layer"
            )


# ------------------------------------------------------------------------------------------------
# quantising


def _quantize_all(
    file: Any, model: Path, names: Sequence[str], job: _Job
) -> tuple[dict[str, QuantizedTensor], list[Row]]:
    """Every layer that holds the format, and a row for each."""
    tensors: dict[str, QuantizedTensor] = {}
    rows = []
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for name in bar.track(names, description="quantising"):
            start = time.perf_counter()
            weight = file.get_tensor(name)
            row: Row = {"layer": name, "shape": f"{weight.shape[0]}x{weight.shape[1]}"}
            try:
                tensor = _quantize_one(file, name, weight, job)
            except UnsupportedError as error:
                rows.append({**row, "status": "refused", "reason": str(error)})
                continue
            except TensorError as error:
                raise TensorError(f"{model}: tensor {name!r}: {error}") from error
            tensors[name] = tensor
            error_share = relative_error(weight, tensor)
            bits = tensor.bits.per_weight()
            seconds = time.perf_counter() - start
            rows.append(
                {**row, "status": "ok", "bits": bits, "error": error_share, "seconds": seconds}
            )
    return tensors, rows


def _made(row: Row, job: _Job) -> Made:
    """How a layer was made; an error that is infinite (of a weight of zeros) is left out."""
    made = {"method": job.spec.method, "seed": job.seed, "iterations": job.iterations}
    return made | ({"error": row["error"]} if math.isfinite(row["error"]) else {})


def _quantize_one(file: Any, name: str, weight: Tensor, job: _Job) -> QuantizedTensor:
    check_fit(job.spec, *weight.shape)
    bias = _bias(file, name, len(weight)) if job.bias else None
    recipe = Recipe(iterations=job.iterations)
    return quantize(weight, job.spec, seed=job.seed, recipe=recipe, bias=bias)


def _bias(file: Any, name: str, n: int) -> Tensor | None:
    """The vector of `n` that lies beside the weight in the checkpoint, if there is one."""
    prefix, dot, _ = name.rpartition(".")
    found = f"{prefix}{dot}bias"
    if found not in file.keys() or list(file.get_slice(found).get_shape()) != [n]:  # noqa: SIM118  # no dict
        return None
    bias: Tensor = file.get_tensor(found)
    return bias


# ------------------------------------------------------------------------------------------------
# what is printed


def _report(rows: Sequence[Row], choice: _Choice, target: Path | None) -> None:
    """The table on standard output; what was refused or skipped, and where it all went, beside."""
    shown = [
        {**row, **{key: f"{row[key]:.4f}" for key in ("bits", "error") if key in row}}
        for row in rows
    ]
    click.echo(render(shown, _COLUMNS, "table").strip("\n"))
    for row in rows:
        if row["status"] == "refused":
            click.echo(f"refused {row['layer']}: {row['reason']}", err=True)
    for reason, names in choice.skipped.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        click.echo(f"skipped {len(names)} {reason}: {', '.join(names[:3])}{more}", err=True)
    if target is None:
        click.echo("nothing was written: no layer holds the format; choose another", err=True)
        return
    click.echo(f"wrote {target} ({target.stat().st_size:,} bytes)", err=True)
