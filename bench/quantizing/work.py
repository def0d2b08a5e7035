"""Finished layers on the disk, beside the output to be: what a later run goes on from.

The work folder of `out/model.vq.safetensors` is `out/.model.vq.safetensors.work`. It holds
`job.json`, what all layers depend on and when they were begun, and of each finished layer a
container, `00000.safetensors` the first. Each file is written whole or not at all, so a killed
process leaves whole layers; and they are checked by their checksums before they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench.quantizing.job import Job
from vqkernels import container
from vqkernels.atomic import explained, locked, write_atomically
from vqkernels.container.manifest import TensorInfo, located
from vqkernels.container.origin import Made
from vqkernels.container.signed import field, read_json, sign, signed
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.tensor import QuantizedTensor

__all__ = ["Layer", "Spent", "WorkFolder"]

_JOB = "job.json"
_OURS = re.compile(r"job\.json|\d{5,}\.safetensors|output|\.vqbench-[0-9a-f]{32}\.tmp")


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a layer cost: `lost` of `total`, sums of squares of error and weight, and time.

    int8_lost: how much of `lost` is due to int8 entries, by `rounding_cost`; 0 without them.
    """

    lost: float
    total: float
    seconds: float
    int8_lost: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Spent(*(mine + its for mine, its in pairs))

    @property
    def int8_cost(self) -> float:
        """By what share the error is larger than with the best float32 entries."""
        exact = self.lost - self.int8_lost
        return self.int8_lost / exact if exact else 0.0

    @property
    def error(self) -> float:
        """The relative error, as `vqkernels.quantize.relative_error` gives it."""
        return self.lost / self.total if self.total else (float("inf") if self.lost else 0.0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A finished layer: its file, what that says of the matrix, and what it cost."""

    file: Path
    info: TensorInfo
    spent: Spent


class WorkFolder:
    """The layers of `job` that are finished, while `opened`.

    path: the folder. created: when the job was begun, as ISO 8601. layers: by name.
    """

    def __init__(self, target: Path, job: Job) -> None:
        self.path = target.parent / f".{target.name}.work"
        self.created = ""
        self.layers: dict[str, Layer] = {}
        self._job, self._numbers = job, {name: i for i, name in enumerate(job.formats)}

    @property
    def begun(self) -> bool:
        """Whether the job is written down: its weights have been checked then."""
        return (self.path / _JOB).exists()

    @property
    def finished(self) -> list[Layer]:
        """The layers in the order of the job, whenever each was finished."""
        return [self.layers[name] for name in self._numbers if name in self.layers]

    @property
    def told(self) -> str:
        """How much is done."""
        return f"{len(self.layers)} of {len(self._numbers)} layers"

    @contextlib.contextmanager
    def opened(self, *, restart: bool) -> Iterator[None]:
        """Hold the folder, with what is left in it of this job, and remove it where that is none.

        restart: whether to remove what is there of any job. Raises ContainerError where another
        process holds it, where it is of another job, and where it can't be made.
        """
        with _made(self.path), locked(self.path / _JOB, wait=False):
            if restart:
                self._remove_files()
            self._resume()
            if self.layers:
                click.echo(f"going on: {self.told} are done already", err=True)
            try:
                yield
            except VqError:
                if self.layers:
                    click.echo(f"{self.told} are kept: the same command goes on", err=True)
                raise
            finally:
                if not self.layers:
                    self._remove_files()
                    # while it is ours: another process may have it later
                    with contextlib.suppress(OSError):
                        self.path.rmdir()

    def begin(self) -> None:
        """Write down which job it is, if that isn't there yet: what follows are its layers."""
        if not self.begun:
            content = {"created": self.created, "job": self._job.to_dict()}
            write_atomically(self.path / _JOB, [json.dumps(sign(content)).encode()])

    def keep(self, name: str, tensor: QuantizedTensor, made: Made, spent: Spent) -> None:
        """Write a finished layer."""
        file = self._file(name)
        origin = {"job": self._job.digest} | {
            key: repr(value) for key, value in dataclasses.asdict(spent).items()
        }
        codes = self._job.codes
        container.save(file, {name: tensor}, provenance=origin, made={name: made}, codes=codes)
        self.layers[name] = self._read(name)

    def clear(self) -> None:
        """Forget all layers: the folder goes once it is closed."""
        self.layers = {}

    def _resume(self) -> None:
        path = self.path / _JOB
        if not self.begun:
            self._remove_files()  # of a process that was killed as it began, or as it cleaned up
            self.created = datetime.now(UTC).isoformat(timespec="seconds")
            return
        with located(path):
            try:
                content = signed(read_json(path))
                self.created = field(content, "created", str, "the job")
                begun = field(content, "job", dict, "the job")
            except ContainerError as error:
                raise ContainerError(f"{error}; or add --restart to start anew") from error
        self._check(begun)
        for name in self._numbers:
            if self._file(name).exists():
                self._take(name)
        for file in self.path.iterdir():
            if file.name.endswith(".tmp") and _OURS.fullmatch(file.name):
                file.unlink()

    def _check(self, begun: dict[str, Any]) -> None:
        """Raise ContainerError unless what was begun is the job, naming where they differ."""
        # by way of JSON, which knows no tuples
        wanted = json.loads(json.dumps(self._job.to_dict()))
        for key in [*wanted, *begun]:
            if (old := begun.get(key)) != (new := wanted.get(key)):
                short = all(isinstance(value, str | int) for value in (old, new))
                what = f"{key} {old}, not {new}" if short else f"other {key}"
                raise ContainerError(
                    f"{self.path}: holds layers of another job ({what}); give the same options to "
                    f"go on with that, or add --restart to start anew"
                )

    def _take(self, name: str) -> None:
        """Read a finished layer, or remove it where it is damaged."""
        try:
            layer = self._read(name)
            _ = container.open_container(layer.file)[name]  # compares checksums
            self.layers[name] = layer
        except (ContainerError, TensorError) as error:
            click.echo(f"{error}: so {name} is quantised again", err=True)
            self._file(name).unlink()

    def _read(self, name: str) -> Layer:
        file = self._file(name)
        info = container.describe(file)
        origin = info.provenance
        if [tensor.name for tensor in info.tensors] != [name] or (
            origin.get("job") != self._job.digest
        ):
            raise ContainerError(f"{file}: is a layer of another job")
        spent = Spent(*(float(origin[f.name]) for f in dataclasses.fields(Spent)))
        return Layer(file, info.tensors[0], spent)

    def _file(self, name: str) -> Path:
        return self.path / f"{self._numbers[name]:05}.safetensors"

    def _remove_files(self) -> None:
        """Remove what may be ours; strangers' files stay."""
        with explained(self.path):
            for file in list(self.path.iterdir()):
                if _OURS.fullmatch(file.name):
                    file.unlink()


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make `folder` and what is above it; what of that was made and is empty at last goes again."""
    above = [path for path in folder.parents if not path.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in above:
            with contextlib.suppress(OSError):
                path.rmdir()
