"""A file mapped into memory, and tensors copied out of it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import ContainerError

__all__ = ["MappedFile"]

_PIECE = 1 << 20  # bytes copied at once

_AGAIN = "copy it again from its source"


class MappedFile:
    """The bytes of a file, none of which stay in memory for being read.

    The mapping is of the file as it was opened, whatever gets its name later, and ends with the
    object. `file` may be closed at once. Raises ContainerError where it has no `size` bytes, of
    which there must be one.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        try:
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ContainerError(f"was cut short while it was opened; {_AGAIN}") from error

    def __len__(self) -> int:
        return len(self._map)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A copy of the tensor at `offset`. Raises ContainerError where the file lost its end.

        A copy, since what is checked has to be what is used, and the file may be changed under us.
        """
        # touching a page behind a file's end ends the process
        if self._map.size() < len(self):
            raise ContainerError(f"was cut short while it was open; {_AGAIN}")
        numel = int(np.prod(shape, dtype=np.int64))
        size = numel * dtype.itemsize
        value = np.empty(size, np.uint8)
        for start in range(0, size, _PIECE):
            stop = min(start + _PIECE, size)
            value[start:stop] = np.frombuffer(self._map, np.uint8, stop - start, offset + start)
            # mapped pages count as ours: a model that is read through would take twice its memory.
            # All of them, since the kernel maps up to 64 KB around the page that is touched
            self._map.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(value).view(dtype).reshape(tuple(shape))
