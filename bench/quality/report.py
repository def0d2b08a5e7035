"""The report: what was measured of which quantised models, as an object and as a JSON file.

The file is an object of these names; numbers that are not finite are the strings "inf" and "nan":

    vqbench_quality: the schema's version
    created, command, seed, environment: when, how and where it was made
    model, calibration: name and SHA-256 of the files that it was made from (calibration: or null)
    candidates: a list, of each quantised model
        label, origin: what it is, with SHA-256 of its files or the seed and recipe of its format
        layers: a list, as `LayerQuality` has them
        totals: the measures over all layers
        refused: matrices that can't be in that format, and why
        unmatched: matrices that the dense model doesn't have
        dense: its matrices that are not quantised
        sections: what was found end to end: `report` and the `rows` of its table, by name
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.quality.layers import LayerQuality
from bench.quality.measures import MEASURES, Values, total
from vqkernels.atomic import write_atomically
from vqkernels.errors import ContainerError
from vqkernels.formats.tensor_files import read_json

__all__ = ["SCHEMA_VERSION", "Judged", "Report", "read_report", "write_report"]

SCHEMA_VERSION = 1

_VERSION = "vqbench_quality"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What was found of one quantised model; the fields are the module's `candidates`."""

    label: str
    origin: Mapping[str, Any]
    layers: tuple[LayerQuality, ...]
    refused: Mapping[str, str]
    unmatched: tuple[str, ...]
    dense: tuple[str, ...]
    sections: Mapping[str, Mapping[str, Any]]

    @property
    def totals(self) -> dict[str, float | None]:
        """Each measure over all layers."""
        layers = [(layer.weights, layer.measures) for layer in self.layers]
        return {name: total(name, layers) for name in MEASURES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report; the fields are the module's."""

    created: str
    command: tuple[str, ...]
    seed: int
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    candidates: tuple[Judged, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` is the inverse."""
        found = {_VERSION: SCHEMA_VERSION, **dataclasses.asdict(self)}
        for told, one in zip(found["candidates"], self.candidates, strict=True):
            told["totals"] = one.totals
        plain: dict[str, Any] = _plain(found)
        return plain

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        """A report from `to_dict`'s output; unknown names are passed over.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        known = _known(cls, found)
        known["candidates"] = tuple(_judged(one) for one in found["candidates"])
        known["command"] = tuple(found["command"])
        return cls(**known)


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path`, whole or not at all. Raises ContainerError where that fails."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(path, [f"{text}\n".encode()])


def read_report(path: Path) -> Report:
    """The report in `path`. Raises ContainerError for anything else, and for another version."""
    found = read_json(path)
    if (version := found.get(_VERSION)) != SCHEMA_VERSION:
        told = "no quality report" if version is None else f"a quality report of version {version}"
        raise ContainerError(
            f"{path}: is {told}, and this vqbench reads version {SCHEMA_VERSION}; "
            f"make it with `vqbench quality --json`"
        )
    try:
        return Report.from_dict(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ContainerError(
            f"{path}: is no whole quality report ({type(error).__name__}: {error}); "
            f"make it again with `vqbench quality --json`"
        ) from error


def _judged(found: Mapping[str, Any]) -> Judged:
    known = _known(Judged, found)
    known["layers"] = tuple(_layer(one) for one in found["layers"])
    known |= {name: tuple(found[name]) for name in ("unmatched", "dense")}
    return Judged(**known)


def _layer(found: Mapping[str, Any]) -> LayerQuality:
    known = _known(LayerQuality, found)
    known["measures"] = _values(found["measures"])
    known["usage"] = tuple(found["usage"])
    return LayerQuality(**known)


def _values(found: Mapping[str, Any]) -> Values:
    return {name: None if (value := found.get(name)) is None else float(value) for name in MEASURES}


def _known(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def _plain(value: Any) -> Any:
    """`value` as strict JSON has it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
