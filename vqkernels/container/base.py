"""What is common to a container file and a set of them."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from vqkernels.container.manifest import ContainerInfo, TensorInfo
from vqkernels.source import TensorSource
from vqkernels.tensor import QuantizedTensor

__all__ = ["Container"]


class Container(TensorSource):
    """Matrices that lie on the disk, mapped into memory; see `open_container`.

    path: the file, or the index of several. info: what the headers say. The mapping ends with
    the object.
    """

    def __init__(self, path: Path, info: ContainerInfo) -> None:
        self.path, self.info = path, info
        self._outlines = {tensor.name: tensor for tensor in info.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._outlines)

    def __len__(self) -> int:
        return len(self._outlines)

    def outline(self, name: str) -> TensorInfo:
        """What the header says of matrix `name`."""
        return self._outlines[name]

    @abc.abstractmethod
    def verify(self, name: str) -> QuantizedTensor:
        """Matrix `name`, its usage and its dequantised values checked too.

        It takes as long as dequantising does. Raises ContainerError and TensorError as a lookup
        does, and KeyError.
        """

    @abc.abstractmethod
    def usage(self, name: str) -> dict[int, Tensor]:
        """How often each entry of a stage is used, int64 `[entries]`, for stages that store it.

        Only that is read. Raises as a lookup does.
        """
