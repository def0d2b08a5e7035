"""Quantised matrices by name, from wherever they lie, each read when it is asked for.

A container, a folder of shards and somebody else's checkpoint are all a TensorSource: what takes
one (a model's layers, a conversion, a benchmark) holds one matrix at a time. A plain dict of
tensors does as well.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

from vqkernels.parts import BitCount, Part, effective_bits, part_table
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["Outline", "TensorSource", "outline_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a matrix `W[n, k]` before its data is read; `bias`: whether it has one."""

    spec: CodebookSpec
    n: int
    k: int
    bias: bool = False

    @property
    def bits(self) -> BitCount:
        """Effective bits of the matrix, by role."""
        return effective_bits([(self.spec, self.n, self.k)])

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix as a QuantizedTensor: codes a byte or two each, not packed."""
        return sum(part.numel * part.dtype.itemsize for part in self.table().values())

    def table(self) -> dict[str, Part]:
        """Its parts, as `part_table` gives them."""
        return part_table(self.spec, self.n, self.k, bias=self.bias)


class TensorSource(Mapping[str, QuantizedTensor]):
    """Quantised matrices by name. Looking one up reads and checks it; nothing is kept here.

    Errors name the file, the tensor and the fix: ContainerError and TensorError, from a lookup;
    what the headers alone show is raised where the source is opened.
    """

    @abc.abstractmethod
    def outline(self, name: str) -> Outline:
        """What is known of matrix `name` without reading its data. Raises KeyError as a lookup."""

    def __contains__(self, name: object) -> bool:
        # the Mapping's own would read the matrix
        try:
            self.outline(name)  # type: ignore[arg-type]  # no other object is a key
        except KeyError:
            return False
        return True


def outline_of(source: Mapping[str, QuantizedTensor], name: str) -> Outline:
    """The outline of matrix `name`; of a mapping that is no TensorSource, by looking it up."""
    if isinstance(source, TensorSource):
        return source.outline(name)
    tensor = source[name]
    return Outline(spec=tensor.spec, n=tensor.n, k=tensor.k, bias=tensor.bias is not None)
