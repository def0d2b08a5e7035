"""Calibrations in safetensors files: `[module]/diagonal`, `/gram` and `/inputs`, with checksums."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqkernels.atomic import write_atomically
from vqkernels.calibration.moments import Calibration, Moments
from vqkernels.container.checksums import sha256
from vqkernels.container.layout import lay_out
from vqkernels.container.manifest import check_name, located, strings
from vqkernels.container.signed import DAMAGED, TEXT, check_version, field, sign, signed
from vqkernels.errors import ContainerError
from vqkernels.formats.tensor_files import opened

__all__ = ["load_calibration", "save_calibration"]

VERSION = 1
PARTS = ("diagonal", "gram", "inputs")


def save_calibration(path: str | os.PathLike[str], calibration: Calibration) -> None:
    """Write `calibration` to `path`, whole or not at all; a file already there is replaced.

    Equal calibrations give equal bytes. Raises TensorError for moments that are none, and
    ContainerError where the file can't be written.
    """
    path = Path(path)
    layers, parts = list[dict[str, Any]](), dict[str, Tensor]()
    with located(path):
        if not calibration:
            raise ContainerError("a calibration of no layer; calibrate one at least")
        for module, moments in calibration.items():
            check_name(module)
            moments.check(f"layer {module!r}")
            found = {
                part: value.detach().cpu().contiguous()
                for part in PARTS
                if (value := getattr(moments, part)) is not None
            }
            sums = {part: sha256(value) for part, value in found.items()}
            layers.append({"module": module, "count": moments.count, "sha256": sums})
            parts |= {f"{module}/{part}": value for part, value in found.items()}
        content = {
            "calibration_version": VERSION,
            "provenance": calibration.provenance,
            "layers": layers,
        }
        pieces = lay_out(sign(content), parts)
    write_atomically(path, pieces)


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """The calibration in the file at `path`; a layer is read and checked when it is looked up.

    Raises ContainerError for what is damaged, truncated, of a newer version or no calibration, and
    from a lookup ContainerError or TensorError for a damaged layer.
    """
    path = Path(path)
    with opened(path) as file, located(path):
        header = file.metadata()
        if not header or TEXT not in header:
            raise ContainerError("is no calibration; make one with `vqbench calibrate`")
        content = signed(header)
        if "calibration_version" not in content:
            raise ContainerError("is no calibration; make one with `vqbench calibrate`")
        check_version(content, "calibration_version", VERSION)
        provenance = strings(content, "provenance", "the file")
        layers = {
            field(entry, "module", str, "a layer"): entry
            for entry in field(content, "layers", list, "the file")
        }
        keys = set(file.keys())
        for module, entry in layers.items():
            _check_header(file, keys, module, entry)
    return Calibration(_Stored(path, layers), provenance)


class _Stored(Mapping[str, Moments]):
    """Moments in a file, each read when it is looked up."""

    def __init__(self, path: Path, layers: Mapping[str, dict[str, Any]]) -> None:
        self._path, self._layers = path, layers

    def __getitem__(self, module: str) -> Moments:
        entry, where = self._layers[module], f"layer {module!r}"
        found: dict[str, Tensor | None] = dict.fromkeys(PARTS)
        with opened(self._path) as file, located(self._path):
            for part, digest in entry["sha256"].items():
                value = file.get_tensor(f"{module}/{part}")
                if sha256(value) != digest:
                    raise ContainerError(f"{where}: {part} doesn't match its checksum; {DAMAGED}")
                found[part] = value
            diagonal = found["diagonal"]
            assert diagonal is not None, "its header was checked"
            moments = Moments(diagonal, found["gram"], entry["count"], found["inputs"])
            moments.check(where)
        return moments

    def __contains__(self, module: object) -> bool:
        return module in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _check_header(file: Any, keys: set[str], module: str, entry: dict[str, Any]) -> None:
    """Raise ContainerError where the file's header and its description disagree on a layer."""
    where = f"layer {module!r}"
    field(entry, "count", int, where)
    parts = strings(entry, "sha256", where)
    shapes = {}
    for part in dict.fromkeys(("diagonal", *parts)):
        key = f"{module}/{part}"
        if part not in PARTS or part not in parts or key not in keys:
            raise ContainerError(f"{where}: there is no {part}; {DAMAGED}")
        shapes[part] = file.get_slice(key).get_shape()
        if file.get_slice(key).get_dtype() != "F32":
            raise ContainerError(f"{where}: {part} is not in float32; {DAMAGED}")
    k = math.prod(shapes["diagonal"])
    rows = (shapes.get("inputs") or [0])[0]
    for part, shape in {"diagonal": [k], "gram": [k, k], "inputs": [rows, k]}.items():
        if shapes.get(part, shape) != shape:
            raise ContainerError(f"{where}: {part} is {shapes[part]}, not {shape}; {DAMAGED}")
