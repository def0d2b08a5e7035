import pytest
import torch

from vqkernels.errors import TensorError
from vqkernels.quantize import Recipe, encode, quantize, relative_error
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import scaled_codebook


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
        {"scale_axis": "row", "zero_axis": "column", "rotation_size": 16},
        {"outlier_columns": 3, "uniform_columns": 5, "permuted": True, "rotation_size": 8},
        {"outlier_columns": 4, "outlier_entries": 8, "outlier_vector_length": 4},
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


def test_encoding_codes_the_sides_anew():
    spec = make(outlier_columns=2, uniform_columns=3, permuted=True, side_dtype="float32")
    weight, other = normal(64, 48), normal(64, 48, seed=1)
    tensor = quantize(weight, spec)
    again = encode(other, tensor)
    order = tensor.parts["permutation"].long()
    assert torch.equal(again.parts["outliers"], other[:, order[:2]])
    lost = (other - again.decode())[:, order[2:5]].abs()
    assert (lost <= 0.51 * tensor.parts["uniform_scale"]).double().mean() > 0.9
    for name in ("permutation", "uniform_scale", "uniform_zero", "codebook_0"):
        assert torch.equal(again.parts[name].float(), tensor.parts[name].float())


# --- codebooks that are given ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(
    "fields",
    [
        {"stages": (16, 8)},
        {"subspaces": 2, "group_axis": "row", "group_size": 32},
        {"scale_axis": "row", "outlier_columns": 2, "permuted": True, "vector_length": 2},
    ],
)
def test_a_tensors_own_codebooks_give_it_back(dtype, fields):
    weight, spec = normal(64, 48), make(codebook_dtype=dtype, **fields)
    tensor = quantize(weight, spec)
    books = [
        scaled_codebook(spec, tensor.parts, stage, torch.float32)
        for stage in range(len(spec.stages))
    ]
    same(quantize(weight, spec, codebooks=books), tensor)


def test_given_codebooks_get_propagated_codes_where_the_method_does_so():
    inputs = normal(400, 48, seed=1) @ (normal(48, 48, seed=2) + 1)
    hessian, weight = inputs.T @ inputs, normal(64, 48)
    spec = make(stages=(16, 8), vector_axis="out", method="vptq")
    books = [quantize(weight, spec).parts[f"codebook_{stage}"] for stage in range(2)]

    def lost(propagate):
        tensor = quantize(
            weight, spec, hessian=hessian, codebooks=books, recipe=Recipe(propagate=propagate)
        )
        assert torch.equal(tensor.parts["codebook_1"], books[1])
        error = weight - tensor.decode()
        return float(torch.einsum("ri,ij,rj->", error, hessian.double(), error))

    assert lost(True) < 0.5 * lost(False)


def test_a_coefficient_is_taken_off_given_codebooks():
    weight = normal(64, 48)
    spec = make(stages=(16, 8), coefficients=(2.0, -0.5))
    tensor = quantize(weight, spec)
    books = [scaled_codebook(spec, tensor.parts, stage, torch.float32) for stage in range(2)]
    same(quantize(weight, spec, codebooks=books), tensor)
    torch.testing.assert_close(tensor.parts["codebook_1"] * -0.5, books[1])


def test_given_codebooks_serve_another_layer():
    spec = make(scale_axis="tensor")
    shared = quantize(normal(128, 48), spec).parts["codebook_0"]
    weight = normal(64, 48, seed=1) * 7
    tensor = quantize(weight, spec, codebooks=[shared.double()])
    tensor.validate()
    assert torch.equal(tensor.parts["codebook_0"], shared)
    assert relative_error(weight, tensor) < 1.15 * relative_error(weight, quantize(weight, spec))
    assert float(tensor.parts["scale"][0]) == pytest.approx(
        float(weight.square().mean().sqrt()), rel=1e-3
    )


def test_encoding_another_shape_is_refused():
    tensor = quantize(normal(64, 48), make())
    with pytest.raises(TensorError, match=r"\[48, 64\], but the tensor is 64 x 48"):
        encode(normal(48, 64), tensor)
