"""Every layer of a job, one at a time: read, quantised, written down and forgotten."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bench.progress import Left
from bench.quantizing.choice import bias_of
from bench.quantizing.importance import hessian_of
from bench.quantizing.job import Job
from bench.quantizing.shared import SharedCodebooks
from bench.quantizing.work import Spent, WorkFolder
from vqkernels import heap
from vqkernels.calibration import Calibration
from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.formats import TensorFiles
from vqkernels.parts import check_fit
from vqkernels.quantize import clip_limits, quantize, squared_errors
from vqkernels.quantize.coverage import CoverageWarning

__all__ = ["quantize_layers"]


def quantize_layers(
    source: TensorFiles, job: Job, work: WorkFolder, calibration: Calibration | None
) -> dict[str, str]:
    """Quantise the layers of `job` that `work` lacks; returns why others were refused, by name.

    calibration: what errors' importance is known from, by layer.

    Raises TensorError, which names the tensor, for one that can't be quantised at all, and
    ContainerError where one can't be read or written.
    """
    refused = {}
    shared = SharedCodebooks(source, job, calibration) if job.shared else None
    left = [name for name in job.formats if name not in work.layers]
    done = len(job.formats) - len(left)
    sizes = {name: math.prod(source.shape(name)) for name in left}
    with _bar(sizes, done) as step:
        for name in left:
            with step(name), _warnings_told(name):
                try:
                    _quantize(source, name, job, work, calibration, shared)
                except UnsupportedError as error:
                    refused[name] = str(error)
                except TensorError as error:
                    raise TensorError(f"{source.path}: tensor {name!r}: {error}") from error
            heap.release()
    return refused


def _quantize(
    source: TensorFiles,
    name: str,
    job: Job,
    work: WorkFolder,
    calibration: Calibration | None,
    shared: SharedCodebooks | None,
) -> None:
    # its own function, so that a layer is gone before the next is read
    start = time.perf_counter()
    spec = job.formats[name]
    n, k = source.shape(name)
    check_fit(spec, n, k)
    weight = source.read(name)
    key = bias_of(source, name) if job.bias else None
    bias = source.read(key) if key else None
    hessian = hessian_of(calibration, name)
    tensor = quantize(
        weight,
        spec,
        seed=job.seed,
        hessian=hessian,
        recipe=job.recipe,
        bias=bias,
        codebooks=shared.of(spec) if shared else None,
    )
    lost, total = squared_errors(weight, tensor)
    spent = Spent(lost, total, time.perf_counter() - start)
    clip = clip_limits(weight, job.recipe)
    made = job.made(name, spent.error, clip=clip, calibrated=hessian is not None)
    work.keep(name, tensor, made, spent)


@contextlib.contextmanager
def _warnings_told(name: str) -> Iterator[None]:
    """What the quantizer warns of, in a line with the layer's name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CoverageWarning)
        yield
    for warning in caught:
        click.echo(f"{name}: {warning.message}", err=True)


@contextlib.contextmanager
def _bar(
    sizes: dict[str, int], done: int
) -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
    """A bar on a terminal: `with step(name)` shows a layer, and afterwards how long all will take.

    sizes: weights of each layer that is to come, which is what its time goes by.
    """
    count, total = done + len(sizes), sum(sizes.values())
    with Progress(
        TextColumn("{task.fields[layers]}"),
        BarColumn(),
        Left(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("", total=total, layers=f"{done}/{count}", end_s=None)
        start, passed, number = time.monotonic(), 0, done

        @contextlib.contextmanager
        def step(name: str) -> Iterator[None]:
            nonlocal passed, number
            bar.update(task, description=name)
            yield
            passed, number = passed + sizes[name], number + 1
            now = time.monotonic()
            end_s = now + (now - start) * (total - passed) / passed
            bar.update(task, completed=passed, layers=f"{number}/{count}", end_s=end_s)

        yield step
