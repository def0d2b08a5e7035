"""The dense model that a quantised one is held against."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from bench.weights import weights_file
from bench.workload import load_workload
from vqkernels.errors import ContainerError
from vqkernels.formats.checkpoint import _entries, _headers, opened

__all__ = ["MINILM", "Original", "counterpart", "linear_weights", "original_of"]

MINILM = "minilm"
"""Stands for the weights in the package of that workload."""

# Weights whose numbers are the weights; FP8 and integer ones need scales from elsewhere.
_DTYPES = ("F64", "F32", "F16", "BF16")

# Tables that are looked up, and gains: no matrix product.
_NOT_LINEAR = ("embed", "norm")


class Original(Mapping[str, Tensor]):
    """The floating-point matrices of a safetensors file or of a model's folder, each read when it
    is looked up.

    path: where they lie. Raises ContainerError where there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise ContainerError(
                f"{path}: there is no such file; give a .safetensors file, a model's folder, or "
                f"{MINILM!r}"
            )
        self._entries = {
            name: entry
            for name, entry in (_entries(path) if path.is_dir() else _headers(path)).items()
            if len(entry.shape) == 2 and entry.dtype in _DTYPES
        }
        if not self._entries:
            raise ContainerError(f"{path}: holds no floating-point matrix; give a dense model")

    def __getitem__(self, name: str) -> Tensor:
        with opened(self._entries[name].file) as file:
            # a copy: pages of a mapping count as memory until the file is closed
            weight: Tensor = file.get_tensor(name).clone()
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of matrix `name`, from its header."""
        return self._entries[name].shape

    @property
    def files(self) -> list[Path]:
        """The files that the matrices lie in."""
        return sorted({entry.file for entry in self._entries.values()})


def original_of(name: str) -> Original:
    """The model at the path `name`, or in the package that `minilm` stands for.

    Raises ContainerError where it can't be read, BackendError where the package is missing.
    """
    packaged = weights_file(load_workload(MINILM)) if name == MINILM else None
    return Original(packaged or Path(name))


def counterpart(original: Original, name: str) -> str | None:
    """The dense matrix that a quantised one called `name` was made from: of a module, its weight;
    None where there is none.
    """
    return next((found for found in (name, f"{name}.weight") if found in original), None)


def linear_weights(original: Original, patterns: Sequence[str]) -> list[str]:
    """Matrices to quantise: those that match a pattern; without any, the weights of linear layers.

    Raises ContainerError where there is none.
    """
    names = [name for name in original if _wanted(name, patterns)]
    if not names:
        what = f"matches {' '.join(patterns)}" if patterns else "is the weight of a linear layer"
        raise ContainerError(f"{original.path}: no matrix {what}; name some with --layer")
    return names


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    if patterns:
        return any(fnmatch.fnmatchcase(name, glob) for glob in patterns)
    lower = name.lower()
    return name.endswith(".weight") and not any(word in lower for word in _NOT_LINEAR)
