"""A stored model as a workload: its quantised matrices as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.selection import Selection
from bench.workload import STORED, Layer, Workload
from vqkernels.errors import ContainerError
from vqkernels.formats import open_source
from vqkernels.source import outline_of

__all__ = ["model_selection", "model_workload"]

# Layers of one input that a block may run as one, by the last part of their names.
_TOGETHER = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def model_workload(path: Path) -> Workload:
    """A layer a matrix of what is at `path`: whatever `open_source` takes.

    Headers alone are read; each matrix is when its layer's turn comes. Raises ContainerError,
    TensorError or SpecError, one line, where they are damaged or there is no matrix.
    """
    source = open_source(path)
    layers = []
    for name in source:
        outline = outline_of(source, name)
        layer = Layer(name=name, n=outline.n, k=outline.k, tensor=name, stored=outline.spec)
        layers.append(layer)
    if not layers:
        raise ContainerError(f"{path}: holds no quantised matrix; quantise or import a model first")
    # the name alone: records travel, and a folder's place is nobody else's business
    name = path.resolve().name
    return Workload(
        name=name,
        about=f"{len(layers)} matrices, as they are stored",
        source=name,
        blocks=1,
        layers=tuple(layers),
        together=_together(layers),
        matrices=source,
    )


def model_selection(
    path: Path, layers: Sequence[str], ms: Sequence[int], *, fuse: bool
) -> Selection:
    """What `vqbench run --model` runs: layers by glob, or one of each kind. Errors as above."""
    workload = model_workload(path)
    if fuse:
        workload = workload.fused()
    if not layers:
        kinds = _kinds(workload.layers)
        about = f"{workload.about}; one of each of {len(kinds)} kinds is run"
        workload = dataclasses.replace(workload, about=about, layers=kinds, together={})
    return Selection(
        workload=workload.name,
        model=workload,
        layers=tuple(layers) or ("*",),
        formats=(STORED,),
        ms=tuple(ms) or (1,),
    )


def _kinds(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The first layer of each last part of a name, shape and format, for all of them."""
    kinds: dict[object, list[Layer]] = {}
    for layer in layers:
        kind = (_last(layer.name), layer.shape, layer.part_spec(STORED))
        kinds.setdefault(kind, []).append(layer)
    return tuple(dataclasses.replace(some[0], stands_for=len(some)) for some in kinds.values())


def _together(layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Layers of one block that have one input and one format, by the name of all."""
    known = {layer.name: layer for layer in layers}
    found = {}
    for layer in layers:
        for fused, parts in _TOGETHER.items():
            if _last(layer.name) != parts[0]:
                continue
            ending = ".weight" if layer.name.endswith(".weight") else ""
            owner = layer.name.removesuffix(parts[0] + ending)
            names = tuple(f"{owner}{part}{ending}" for part in parts)
            alike = {(one.k, one.stored) for name in names if (one := known.get(name))}
            if all(name in known for name in names) and len(alike) == 1:
                found[f"{owner}{fused}{ending}"] = names
    return found


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
