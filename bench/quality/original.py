"""The dense model that a quantised one is held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from bench.weights import model_path
from vqkernels.errors import ContainerError
from vqkernels.formats import TensorFiles

__all__ = ["MINILM", "Original", "counterpart", "original_of"]

MINILM = "minilm"
"""The workload whose weights are a sentence encoder's."""

# Weights whose numbers are the weights; FP8 and integer ones need scales from elsewhere.
_DTYPES = ("F64", "F32", "F16", "BF16")


class Original(Mapping[str, Tensor]):
    """The floating-point matrices of a safetensors file or of a model's folder, each read when it
    is looked up.

    path: where they lie; tensors: all that lies there. Raises ContainerError where there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tensors = path, TensorFiles(path)
        self._names = dict.fromkeys(
            name
            for name in self.tensors.keys()  # noqa: SIM118  # not a dict
            if len(self.tensors.shape(name)) == 2 and self.tensors.dtype_name(name) in _DTYPES
        )
        if not self._names:
            raise ContainerError(f"{path}: holds no floating-point matrix; give a dense model")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.tensors.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @property
    def files(self) -> list[Path]:
        """The files that the matrices lie in."""
        return sorted({self.tensors.file(name) for name in self})


def original_of(name: str) -> Original:
    """The model at the path `name`, or of the workload of that name, as `minilm`.

    Raises ContainerError where it can't be read, BackendError where the package is missing.
    """
    return Original(model_path(name))


def counterpart(original: Original, name: str) -> str | None:
    """The dense matrix that a quantised one called `name` was made from: of a module, its weight;
    None where there is none.
    """
    return next((found for found in (name, f"{name}.weight") if found in original), None)
