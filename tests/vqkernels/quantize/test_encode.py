import pytest
import torch

from vqkernels.errors import TensorError
from vqkernels.quantize import encode, quantize
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32"}
                        | fields)  # fmt: skip


def same(first, second):
    assert first.parts.keys() == second.parts.keys()
    for name, part in first.parts.items():
        assert torch.equal(part.float(), second.parts[name].float()), name


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": (16, 16)},
        {"subspaces": 2, "group_axis": "row", "group_size": 24},
        {"scale_axis": "row", "vector_axis": "out", "codebook_dtype": "int8"},
        {"scale_axis": "column", "vector_length": 5},
    ],
)
def test_encoding_the_same_weight_gives_the_same_codes(fields):
    weight = normal(64, 48)
    tensor = quantize(weight, make(**fields), bias=normal(64))
    same(encode(weight, tensor), tensor)


def test_encoding_finds_the_codes_of_a_decoded_tensor():
    tensor = quantize(normal(64, 48), make())
    other = tensor.replace_parts(codes=tensor.parts["codes"].flip(0))
    same(encode(other.decode(), tensor), other)


def test_encoding_another_shape_is_refused():
    tensor = quantize(normal(64, 48), make())
    with pytest.raises(TensorError, match=r"\[48, 64\], but the tensor is 64 x 48"):
        encode(normal(48, 64), tensor)
