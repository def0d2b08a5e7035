from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given

from tests.strategies import quantized_tensors
from vqkernels.source import Outline, TensorSource, outline_of
from vqkernels.tensor import QuantizedTensor


@given(quantized_tensors(max_side=12))
def test_an_outline_is_what_the_tensor_is(tensor: QuantizedTensor) -> None:
    outline = outline_of({"layer": tensor}, "layer")
    assert (outline.spec, outline.n, outline.k) == (tensor.spec, tensor.n, tensor.k)
    assert outline.bits == tensor.bits
    assert outline.table().keys() == tensor.parts.keys()
    assert outline.nbytes == sum(part.nbytes for part in tensor.parts.values())


def test_a_source_tells_without_being_read() -> None:
    class Unread(TensorSource):
        def __getitem__(self, name: str) -> QuantizedTensor:
            raise AssertionError("read")

        def __iter__(self) -> Iterator[str]:
            return iter(["layer"])

        def __len__(self) -> int:
            return 1

        def outline(self, name: str) -> Outline:
            return outlines[name]

    outlines = {"layer": Outline(spec=None, n=3, k=4)}  # type: ignore[arg-type]  # never looked at
    assert outline_of(Unread(), "layer") is outlines["layer"]
    assert "layer" in Unread()
    assert "other" not in Unread()
    with pytest.raises(KeyError):
        outline_of(Unread(), "other")
