from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.strategies import fitting_specs, quantized_tensors
from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.parts import effective_bits, part_table
from vqkernels.presets import PRESETS
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor, row_step

# Everything that a format can have at once, on 12 x 21.
RICH = CodebookSpec(
    vector_length=4,
    stages=(7, 3),
    scale_axis="row",
    zero_axis="column",
    permuted=True,
    rotation_size=8,
    codebook_dtype="int8",
    outlier_columns=2,
    outlier_entries=5,
    outlier_vector_length=3,
    uniform_columns=3,
    uniform_bits=4,
)


def rich() -> QuantizedTensor:
    return random_tensor(RICH, 12, 21, seed=1, bias=True)


# ------------------------------------------------------------------------------------------------
# decode, against the definition in CodebookSpec's docstring, one weight at a time


def lists(tensor: QuantizedTensor) -> dict[str, Any]:
    return {
        name: value.double().tolist() if value.is_floating_point() else value.tolist()
        for name, value in tensor.parts.items()
    }


def slow_main(spec: CodebookSpec, parts: dict[str, Any], row: int, column: int) -> float:
    along, across = (column, row) if spec.vector_axis == "in" else (row, column)
    block, offset = divmod(along, spec.vector_length * spec.stride)
    # neighbours of one vector are `stride` apart, so offset = element * stride + lane
    element, lane = divmod(offset, spec.stride)
    vector = block * spec.stride + lane
    group = {"tensor": 0, "row": row, "column": column}[spec.group_axis] // (spec.group_size or 1)
    subspace = vector % spec.subspaces
    if spec.vector_axis == "in":
        across, lane = divmod(across, spec.vector_width)
        element += lane * spec.vector_length  # an entry lies row after row
    cell = (across, vector) if spec.vector_axis == "in" else (vector, across)
    total = 0.0
    for stage in range(len(spec.stages)):
        code = parts["codes"][cell[0]][cell[1]][stage]
        entry = parts[f"codebook_{stage}"][group][subspace][code][element]
        if spec.codebook_dtype == "int8":
            entry *= parts["codebook_scale"][group][subspace][stage]
        total += entry * (spec.coefficients[stage] if spec.coefficients else 1)
    return total


def slow_side(spec: CodebookSpec, parts: dict[str, Any], row: int, column: int) -> float:
    if column >= spec.outlier_columns:
        uniform = column - spec.outlier_columns
        code = parts["uniform_codes"][row][uniform]
        return code * parts["uniform_scale"][uniform] + parts["uniform_zero"][uniform]
    if not spec.outlier_entries:
        return parts["outliers"][row][column]
    number, element = divmod(row, spec.outlier_vector_length)
    return parts["outlier_codebook"][parts["outlier_codes"][number][column]][element]


def slow_stored(tensor: QuantizedTensor) -> np.ndarray:
    spec, parts = tensor.spec, lists(tensor)
    side = spec.outlier_columns + spec.uniform_columns
    weight = np.zeros((tensor.n, tensor.k))
    for row, column in itertools.product(range(tensor.n), range(tensor.k)):
        if column < side:
            weight[row, column] = slow_side(spec, parts, row, column)
        else:
            weight[row, column] = slow_main(spec, parts, row, column - side)
    return weight


def slow_decode(tensor: QuantizedTensor) -> np.ndarray:
    spec, parts = tensor.spec, lists(tensor)
    stored = slow_stored(tensor)
    side, size = spec.outlier_columns + spec.uniform_columns, spec.rotation_size
    if size:
        rotated = stored.copy()
        for row, column in itertools.product(range(tensor.n), range(side, tensor.k)):
            start = side + (column - side) // size * size
            rotated[row, column] = sum(
                stored[row, start + i] * parts["rotation"][i][column - start] for i in range(size)
            )
        stored = rotated
    weight = np.zeros_like(stored)
    for column in range(tensor.k):
        weight[:, parts["permutation"][column] if spec.permuted else column] = stored[:, column]
    for row, column in itertools.product(range(tensor.n), range(tensor.k)):
        index = {"tensor": 0, "row": row, "column": column}
        if spec.scale_axis != "none":
            weight[row, column] *= parts["scale"][index[spec.scale_axis]]
        if spec.zero_axis != "none":
            weight[row, column] += parts["zero"][index[spec.zero_axis]]
    return weight


@given(quantized_tensors(max_side=14, max_entries=20))
def test_decode_is_the_definition(tensor: QuantizedTensor) -> None:
    np.testing.assert_allclose(tensor.decode().numpy(), slow_decode(tensor), rtol=1e-9, atol=1e-9)


@given(quantized_tensors(max_side=14, max_entries=20))
def test_stored_weight_is_the_definition_to_the_bit(tensor: QuantizedTensor) -> None:
    # to the bit, since the container's checksum is of these values
    np.testing.assert_array_equal(tensor.stored_weight().numpy(), slow_stored(tensor))


def test_every_side_at_once_by_the_definition() -> None:
    np.testing.assert_allclose(rich().decode().numpy(), slow_decode(rich()), rtol=1e-12, atol=1e-12)


def test_a_decode_by_hand() -> None:
    # VPTQ on 3 x 2: vectors of 2 along out, the second one padded
    spec = CodebookSpec(vector_length=2, stages=(2, 2), vector_axis="out", coefficients=(1.0, 0.5))
    books = {
        "codebook_0": torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float16),
        "codebook_1": torch.tensor([[[[0.0, 0.0], [10.0, 20.0]]]], dtype=torch.float16),
    }
    codes = torch.tensor([[[0, 0], [1, 0]], [[1, 1], [0, 1]]], dtype=torch.uint8)
    tensor = QuantizedTensor(spec, 3, 2, {"codes": codes, **books})
    tensor.validate()
    assert tensor.decode().tolist() == [[1, 3], [2, 4], [8, 6]]


def test_a_decode_of_wide_vectors_by_hand() -> None:
    # AQLM on 3 x 4: vectors of two rows and two columns, the second row of codes padded
    spec = CodebookSpec(vector_length=2, vector_width=2, stages=(2,), scale_axis="row")
    parts = {
        "codes": torch.tensor([[[0], [1]], [[1], [0]]], dtype=torch.uint8),
        "codebook_0": torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]]]], dtype=torch.float16),
        "scale": torch.tensor([1.0, 2, 3], dtype=torch.float16),
    }
    tensor = QuantizedTensor(spec, 3, 4, parts)
    tensor.validate()
    assert tensor.decode().tolist() == [[1, 2, 5, 6], [6, 8, 14, 16], [15, 18, 3, 6]]
    assert row_step(spec) == 2
    assert tensor.rows(2, 3).decode().tolist() == [[15, 18, 3, 6]]


# ------------------------------------------------------------------------------------------------
# rows


@given(quantized_tensors())
def test_rows_decode_as_in_the_whole(tensor: QuantizedTensor) -> None:
    step = row_step(tensor.spec)
    cuts = [*range(0, tensor.n, step), tensor.n]
    stored, decoded = tensor.stored_weight(), tensor.decode()
    for start, stop in itertools.combinations(cuts, 2):
        rows = tensor.rows(start, stop)
        rows.validate()
        assert torch.equal(rows.stored_weight(), stored[start:stop])
        torch.testing.assert_close(rows.decode(), decoded[start:stop], rtol=1e-12, atol=1e-12)
        if tensor.bias is not None:
            assert rows.bias is not None
            assert torch.equal(rows.bias, tensor.bias[start:stop])


def test_rows_of_subspaces_along_out_keep_their_codebooks() -> None:
    # the third vector is in subspace 0 again: a cut after the first would shift the cycle
    spec = CodebookSpec(vector_length=2, stages=(2,), vector_axis="out", subspaces=2)
    assert row_step(spec) == 4
    strided = dataclasses.replace(spec, stride=2)
    assert row_step(strided) == 4
    assert row_step(dataclasses.replace(spec, stride=3)) == 12


# ------------------------------------------------------------------------------------------------
# validate


@given(fitting_specs())
def test_a_random_tensor_is_valid_and_repeats(drawn: tuple[CodebookSpec, int, int]) -> None:
    spec, n, k = drawn
    tensor, again = (random_tensor(spec, n, k, seed=3, bias=True) for _ in range(2))
    tensor.validate()
    assert list(tensor.parts) == list(part_table(spec, n, k, bias=True))
    for name, value in tensor.parts.items():
        assert value.is_contiguous(), name
        assert torch.equal(value, again.parts[name]), name
    assert tensor.bits == effective_bits([drawn])


def test_a_random_tensor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="65,536 entries"):
        random_tensor(PRESETS["aqlm-1x16"], 64, 64)


@pytest.mark.parametrize("part", [name for name in rich().parts if name != "bias"])
def test_a_missing_part_is_named(part: str) -> None:
    tensor = rich()
    parts = {name: value for name, value in tensor.parts.items() if name != part}
    with pytest.raises(TensorError, match=f"layer: part '{part}' is missing"):
        dataclasses.replace(tensor, parts=parts).validate("layer")


def test_an_extra_part_is_named() -> None:
    with pytest.raises(TensorError, match="layer: part 'outliers' is not part"):
        rich().replace_parts(outliers=torch.zeros(12, 2)).validate("layer")


@pytest.mark.parametrize("part", rich().parts)
def test_a_wrong_shape_or_dtype_is_named(part: str) -> None:
    tensor = rich()
    value = tensor.parts[part]
    for wrong in (value[:-1], value.unsqueeze(0), value.to(torch.float64)):
        with pytest.raises(TensorError, match=f"layer: {part} is .* but the format needs"):
            tensor.replace_parts(**{part: wrong}).validate("layer")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "part", [name for name, value in rich().parts.items() if value.is_floating_point()]
)
def test_a_value_that_is_not_finite_is_refused(part: str, bad: float) -> None:
    tensor = rich()
    value = tensor.parts[part].clone()
    value.view(-1)[-1] = bad
    with pytest.raises(TensorError, match=f"layer: {part} holds NaN or infinity"):
        tensor.replace_parts(**{part: value}).validate("layer")


def test_a_nan_in_a_float_codebook_is_refused() -> None:
    tensor = random_tensor(PRESETS["toy-16-4"], 16, 16)
    book = tensor.parts["codebook_1"].clone()
    book[0, 0, 3, 7] = float("nan")
    with pytest.raises(TensorError, match="codebook_1 holds NaN"):
        tensor.replace_parts(codebook_1=book).validate()


@pytest.mark.parametrize(
    ("part", "index", "code", "says"),
    [
        ("codes", (11, 3, 0), 7, "codes of stage 0 reach 7, but the codebook has 7"),
        ("codes", (0, 0, 1), 3, "codes of stage 1 reach 3, but the codebook has 3"),
        ("codes", (0, 0, 1), 255, "codes of stage 1 reach 255"),
        ("outlier_codes", (3, 1), 5, "outlier_codes reach 5, but the codebook has 5"),
        ("uniform_codes", (11, 2), 16, "uniform_codes reach 16, but the codebook has 16"),
        ("permutation", (0,), 21, "permutation"),
        ("permutation", (20,), 65535, "permutation"),
    ],
)
def test_a_code_out_of_range_is_refused(
    part: str, index: tuple[int, ...], code: int, says: str
) -> None:
    tensor = rich()
    value = tensor.parts[part].clone()
    value[index] = code
    with pytest.raises(TensorError, match=f"layer: {says}"):
        tensor.replace_parts(**{part: value}).validate("layer")
    value[index] = tensor.parts[part][index]
    tensor.replace_parts(**{part: value}).validate("layer")


def test_the_highest_codes_are_valid() -> None:
    tensor = rich()
    codes = tensor.parts["codes"].clone()
    codes[0, 0, 0], codes[0, 0, 1] = 6, 2
    tensor.replace_parts(codes=codes).validate()


def test_a_permutation_that_repeats_an_input_is_refused() -> None:
    tensor = rich()
    order = tensor.parts["permutation"].clone()
    order[0] = order[1]
    with pytest.raises(TensorError, match="permutation names an input twice"):
        tensor.replace_parts(permutation=order).validate()


@pytest.mark.parametrize(("n", "k"), [(0, 21), (12, 0), (12, 5), (12, 20)])
def test_sides_that_cannot_be_are_refused(n: int, k: int) -> None:
    with pytest.raises(TensorError, match="layer: "):
        dataclasses.replace(rich(), n=n, k=k).validate("layer")


def test_bias_and_bits() -> None:
    tensor = rich()
    assert tensor.bias is tensor.parts["bias"]
    assert random_tensor(RICH, 12, 21).bias is None
    assert tensor.bits.weights == 12 * 21
    assert torch.equal(tensor.to("cpu").decode(), tensor.decode())


def test_widened_codes_are_the_same_codes():
    tensor = random_tensor(PRESETS["aqlm-1x16"], 64, 64, fit=False)
    wide = tensor.widened()
    assert (tensor.parts["codes"].dtype, wide.parts["codes"].dtype) == (torch.uint16, torch.int32)
    assert torch.equal(wide.decode(), tensor.decode())
    assert wide.parts["codebook_0"] is tensor.parts["codebook_0"]
