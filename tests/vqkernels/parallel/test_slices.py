"""One matrix over several ranks: every bit of it in its place, whole again bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import quantized_tensors
from vqkernels.device import detect_cpu
from vqkernels.errors import SpecError, TensorError, UnsupportedError
from vqkernels.kernel import registry
from vqkernels.parallel import Slice, merge, split
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor, row_step
from vqkernels.testing import prepare

AXES = ("row", "column")
CPU = detect_cpu(1)


def same_bits(one: Tensor, other: Tensor) -> bool:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
    return torch.equal(*flat)


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (one.spec, one.n, one.k, list(one.parts)) == (
        other.spec,
        other.n,
        other.k,
        list(other.parts),
    )
    for name in one.parts:
        assert same_bits(one.parts[name], other.parts[name]), name


def joined_decode(slices: list[Slice]) -> Tensor:
    """Rows one after the other; columns each at its input feature."""
    decodes = [one.tensor.decode() for one in slices]
    return torch.cat(decodes, 0 if slices[0].axis == "row" else 1)


def cut(tensor: QuantizedTensor, ranks: int, axis: Any) -> list[Slice] | None:
    try:
        return split(tensor, ranks, axis)
    except UnsupportedError:
        return None


def check_slices(tensor: QuantizedTensor, slices: list[Slice]) -> None:
    axis, ranks = slices[0].axis, len(slices)
    assert [one.rank for one in slices] == list(range(ranks))
    assert [one.start for one in slices] + [slices[-1].stop] == [0] + [one.stop for one in slices]
    for one in slices:
        one.tensor.validate()
        assert one.tensor.decode().shape == (one.tensor.n, one.tensor.k)
    biases = [one.tensor.parts.get("bias") for one in slices]
    if tensor.bias is None:
        assert biases == [None] * ranks
    elif axis == "row":
        assert same_bits(torch.cat([bias for bias in biases if bias is not None]), tensor.bias)
    else:  # once, since the ranks' sums add up
        assert biases[1:] == [None] * (ranks - 1)
        assert biases[0] is not None
        assert same_bits(biases[0], tensor.bias)
    if tensor.spec.rotation_size:
        # products of matrices: another number of rows may be summed in another order
        assert torch.allclose(joined_decode(slices), tensor.decode(), rtol=1e-12, atol=1e-10)
    else:
        assert same_bits(joined_decode(slices), tensor.decode())


@settings(max_examples=60)
@given(quantized_tensors(), st.integers(1, 5), st.sampled_from(AXES))
def test_any_tensor_is_split_and_merged_bit_for_bit(
    tensor: QuantizedTensor, ranks: int, axis: Any
) -> None:
    slices = cut(tensor, ranks, axis)
    if slices is None:  # only where there is no place for a cut
        assert ranks > 1
        assert axis == "column" or ranks > -(-tensor.n // row_step(tensor.spec))
        return
    check_slices(tensor, slices)
    assert_same(merge(slices[::-1]), tensor)


@pytest.mark.sweep
@settings(max_examples=800)
@given(quantized_tensors(max_side=64), st.integers(1, 9), st.sampled_from(AXES))
def test_any_larger_tensor_is_split_and_merged(
    tensor: QuantizedTensor, ranks: int, axis: Any
) -> None:
    if (slices := cut(tensor, ranks, axis)) is not None:
        check_slices(tensor, slices)
        assert_same(merge(slices), tensor)


# ------------------------------------------------------------------------------------------------
# formats that serving cuts


RICH = CodebookSpec(
    vector_length=2,
    stages=(7, 3),
    subspaces=2,
    stride=3,
    scale_axis="column",
    zero_axis="row",
    codebook_dtype="int8",
    outlier_columns=2,
    outlier_entries=5,
    outlier_vector_length=3,
    uniform_columns=3,
    uniform_bits=4,
    group_axis="column",
    group_size=12,
    rotation_size=4,
)
# As VPTQ stores a layer: vectors along the outputs, outliers, columns permuted.
VPTQ = CodebookSpec(
    vector_length=8,
    vector_axis="out",
    stages=(16, 4),
    scale_axis="column",
    zero_axis="column",
    permuted=True,
    outlier_columns=5,
    outlier_entries=6,
    outlier_vector_length=4,
)
SPECS: dict[str, tuple[CodebookSpec, int, int]] = {
    "rich": (RICH, 24, 5 + 84),
    "vptq": (VPTQ, 29, 90),
    "vptq, outliers as they are": (
        dataclasses.replace(VPTQ, outlier_entries=0, outlier_vector_length=0),
        29,
        90,
    ),
    "vptq, groups": (
        dataclasses.replace(VPTQ, permuted=False, group_axis="column", group_size=16),
        29,
        5 + 64,
    ),
    "aqlm": (CodebookSpec(vector_length=8, stages=(256, 256), scale_axis="row"), 32, 128),
    "a set for 5 rows": (
        CodebookSpec(vector_length=4, stages=(6,), group_axis="row", group_size=5, zero_axis="row"),
        33,
        33,
    ),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("spec", "n", "k"), SPECS.values(), ids=SPECS)
def test_a_format_is_split_and_merged(
    spec: CodebookSpec, n: int, k: int, ranks: int, axis: Any
) -> None:
    tensor = random_tensor(spec, n, k, seed=3, bias=True)
    slices = split(tensor, ranks, axis)
    check_slices(tensor, slices)
    assert len(slices) == ranks
    assert_same(merge(slices), tensor)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["vptq", "aqlm"])
def test_a_kernel_multiplies_by_slices(name: str, axis: Any) -> None:
    spec, n, k = SPECS[name]
    tensor = random_tensor(spec, n, k, seed=5, bias=True)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    kernel, products = registry()["torch/dequant"], []
    for one in split(tensor, 3, axis):
        own = one.tensor
        problem = Problem(m=3, n=own.n, k=own.k, spec=own.spec, bias=own.bias is not None)
        run, packed = prepare(kernel, problem, CPU, own)
        y = torch.empty(3, own.n)
        run(packed, (x if axis == "row" else x[:, one.start : one.stop]).contiguous(), y)
        products.append(y)
    y = torch.cat(products, 1) if axis == "row" else torch.stack(products).sum(0)
    whole = x @ tensor.decode(torch.float32).T + tensor.parts["bias"]
    assert torch.allclose(y, whole, rtol=1e-4, atol=1e-3)


def test_again_for_another_number_of_ranks() -> None:
    spec, n, k = SPECS["vptq"]
    tensor = random_tensor(spec, n, k, seed=1)
    again = split(merge(split(tensor, 4, "column")), 3, "row")
    assert_same(merge(again), tensor)


# ------------------------------------------------------------------------------------------------
# where the cuts lie


def sizes(slices: list[Slice]) -> list[int]:
    return [one.stop - one.start for one in slices]


def simple(n: int = 8, k: int = 64, **fields: Any) -> QuantizedTensor:
    options: dict[str, Any] = {"vector_length": 4, "stages": (3,), **fields}
    return random_tensor(CodebookSpec(**options), n, k, seed=2, fit=False)


@pytest.mark.parametrize(
    ("n", "ranks", "expected"),
    [
        (64, 4, [16, 16, 16, 16]),
        (17, 2, [8, 9]),  # the short block goes with another one
        (40, 2, [16, 24]),
        (48, 4, [8, 16, 8, 16]),
        (7, 1, [7]),
        (9, 2, [8, 1]),
    ],
)
def test_rows_are_cut_evenly_between_vectors(n: int, ranks: int, expected: list[int]) -> None:
    tensor = simple(n, vector_axis="out", vector_length=8)
    assert sizes(split(tensor, ranks, "row")) == expected


@pytest.mark.parametrize(
    ("fields", "k", "ranks", "expected"),
    [
        ({}, 64, 4, [16, 16, 16, 16]),
        ({}, 30, 4, [8, 8, 8, 6]),
        ({"outlier_columns": 3}, 67, 4, [15, 20, 16, 16]),
        ({"outlier_columns": 40}, 64, 4, [44, 4, 4, 12]),  # no rank without main columns
        ({"rotation_size": 24}, 72, 2, [24, 48]),
        ({"stride": 2, "subspaces": 4}, 64, 3, [16, 32, 16]),
        ({"group_axis": "column", "group_size": 16}, 64, 8, [8] * 8),  # half a group each
        ({"group_axis": "column", "group_size": 16}, 64, 3, [16, 32, 16]),
        ({"vector_axis": "out"}, 10, 3, [3, 4, 3]),
    ],
)
def test_columns_are_cut_evenly_between_what_must_stay_whole(
    fields: dict[str, Any], k: int, ranks: int, expected: list[int]
) -> None:
    tensor = simple(8, k, **fields)
    slices = split(tensor, ranks, "column")
    assert sizes(slices) == expected
    check_slices(tensor, slices)
    assert_same(merge(slices), tensor)


def test_main_columns_that_are_the_first_inputs() -> None:
    # no rank without main columns, though 40 of 64 features are outliers, and the last ones
    order = torch.tensor([*range(24, 64), *range(24)]).to(torch.uint16)
    tensor = simple(vector_axis="out", outlier_columns=40, permuted=True)
    tensor = tensor.replace_parts(permutation=order)
    slices = split(tensor, 4, "column")
    assert sizes(slices) == [16, 6, 1, 41]
    check_slices(tensor, slices)
    assert_same(merge(slices), tensor)


def test_a_permutation_that_keeps_groups_and_vectors_together() -> None:
    # groups of 16 columns, their order and that of vectors of 4 in them changed: 4 ranks have one
    # group each; 2 ranks would have two, but not beside each other
    tensor = simple(permuted=True, group_axis="column", group_size=16)
    inside = torch.arange(16).reshape(4, 4).flip(0).flatten()
    order = torch.cat([16 * group + inside for group in (2, 0, 3, 1)]).to(torch.uint16)
    tensor = tensor.replace_parts(permutation=order)
    for ranks in (4, 2):
        slices = split(tensor, ranks, "column")
        check_slices(tensor, slices)
        assert_same(merge(slices), tensor)


def refusals() -> dict[str, tuple[QuantizedTensor, int, Any, str]]:
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.uint16)
    return {
        "rows": (
            simple(16, vector_axis="out"),
            5,
            "row",
            "16 outputs .* 5 ranks: .* 4 whole vectors .*; use fewer ranks, or",
        ),
        "columns": (
            simple(),
            17,
            "column",
            "64 inputs .* 17 ranks: .* leave 16 whole; use fewer ranks, or",
        ),
        "vectors mixed": (
            simple(permuted=True).replace_parts(permutation=mixed),
            2,
            "column",
            "permutation",
        ),
        "rotation": (
            simple(rotation_size=64),
            2,
            "column",
            "rotation, leave 1 whole; .* or split by row",
        ),
        "none": (simple(), 0, "row", "0 ranks; use 1 or more"),
        "groups mixed": (
            simple(
                vector_axis="out", permuted=True, group_axis="column", group_size=16
            ).replace_parts(permutation=mixed),
            2,
            "column",
            "mixed by its permutation",
        ),
        "groups interleaved": (  # a place to cut, but two of every three columns are of group 0
            simple(
                vector_axis="out", permuted=True, group_axis="column", group_size=32
            ).replace_parts(permutation=torch.tensor(INTERLEAVED).to(torch.uint16)),
            2,
            "column",
            "permutation, leave 1 whole; .* split by row",
        ),
    }


# stored columns 0-15 and 32-47 on the first rank: half of either group
INTERLEAVED = [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]


@pytest.mark.parametrize("case", refusals())
def test_what_no_exact_cut_serves_is_refused(case: str) -> None:
    tensor, ranks, axis, says = refusals()[case]
    with pytest.raises(UnsupportedError, match=says) as caught:
        split(tensor, ranks, axis)
    assert "\n" not in str(caught.value)


def test_another_axis_is_refused() -> None:
    with pytest.raises(SpecError, match="a split by 'in'; use 'row' or 'column'"):
        split(simple(), 2, "in")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------
# slices that don't belong together


def changed(slices: list[Slice], rank: int, **parts: Tensor) -> list[Slice]:
    one = slices[rank]
    other = dataclasses.replace(one, tensor=one.tensor.replace_parts(**parts))
    return [*slices[:rank], other, *slices[rank + 1 :]]


def without_bias(one: Slice) -> Slice:
    parts = {name: part for name, part in one.tensor.parts.items() if name != "bias"}
    return dataclasses.replace(one, tensor=dataclasses.replace(one.tensor, parts=parts))


@pytest.mark.parametrize("axis", AXES)
def test_slices_of_two_matrices(axis: Any) -> None:
    spec, n, k = SPECS["vptq"]
    slices = split(random_tensor(spec, n, k, bias=True), 3, axis)
    other = split(random_tensor(spec, n, k + 3, bias=True), 3, axis)
    fewer = split(random_tensor(spec, n, k, bias=True), 2, axis)
    bare = [without_bias(slices[0]), *slices[1:]]
    moved = [slices[0], dataclasses.replace(slices[1], start=slices[1].start + 1), slices[2]]
    shifted = dataclasses.replace(slices[2], start=slices[2].start + 1, stop=slices[2].stop + 1)
    for wrong, says in (
        ([], "no slices"),
        ([*slices[:2], shifted], "rank 2 is .* the next"),
        (slices[:2], "ranks 0, 1, but there are 3"),
        ([*slices, slices[0]], "ranks 0, 0, 1, 2"),
        ([slices[0], other[1], slices[2]], "rank 1 is of another matrix"),
        ([fewer[0], slices[1], slices[2]], "ranks 0, 1, 2, but there are 2"),
        (bare, "rank 0 lacks the bias"),
        (moved, "rank 1 is .* the next"),
    ):
        with pytest.raises(TensorError, match=says) as caught:
            merge(wrong)
        assert "\n" not in str(caught.value)


def test_slices_that_end_before_the_whole() -> None:
    slices = split(simple(16, vector_axis="out"), 2, "row")
    more = dataclasses.replace(slices[0].whole, n=17)
    with pytest.raises(TensorError, match="the slices end at feature 16"):
        merge([dataclasses.replace(one, whole=more) for one in slices])


def test_a_bias_on_two_ranks_of_a_column_split() -> None:
    slices = split(random_tensor(VPTQ, 32, 64, bias=True), 2, "column")
    with pytest.raises(TensorError, match="rank 1 has a bias"):
        merge(changed(slices, 1, bias=torch.zeros(32)))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("part", ["codebook_0", "outlier_codebook", "scale"])
def test_ranks_that_differ_in_what_they_share(part: str, axis: Any) -> None:
    spec = dataclasses.replace(VPTQ, scale_axis="tensor")
    slices = split(random_tensor(spec, 32, 64, seed=4), 2, axis)
    assert all(part in one.tensor.parts for one in slices)
    value = slices[1].tensor.parts[part].clone()
    value.view(-1)[0] *= -1
    with pytest.raises(TensorError, match=f"rank 1 has another {part} than rank 0"):
        merge(changed(slices, 1, **{part: value}))


def test_two_ranks_that_differ_in_a_group_s_codebook() -> None:
    slices = split(simple(group_axis="column", group_size=16), 8, "column")
    value = slices[3].tensor.parts["codebook_0"] + 1
    with pytest.raises(TensorError, match="two ranks have another codebook_0 of one group"):
        merge(changed(slices, 3, codebook_0=value))


def test_positions_that_are_not_the_slice_s() -> None:
    tensor = random_tensor(VPTQ, 32, 64, seed=4)
    slices = split(tensor, 2, "column")
    places = [one.positions for one in slices]
    assert places[0] is not None
    assert places[1] is not None
    twice = [slices[0], dataclasses.replace(slices[1], positions=places[1].clone().fill_(3))]
    swapped = [
        dataclasses.replace(one, positions=torch.arange(one.start, one.stop)) for one in slices
    ]
    for wrong, says in ((twice, "twice or not at all"), (swapped, "another format")):
        with pytest.raises(TensorError, match=says):
            merge(wrong)


def test_an_invalid_slice() -> None:
    slices = split(simple(), 2, "row")
    bad = slices[1].tensor.parts["codes"].clone().fill_(3)
    with pytest.raises(TensorError, match="rank 1: codes of stage 0 reach 3"):
        merge(changed(slices, 1, codes=bad))


def test_cuts_are_as_even_as_blocks_allow() -> None:
    for n, ranks in itertools.product(range(1, 40), range(1, 6)):
        cells = -(-n // 8)
        if ranks <= cells:
            shares = sizes(split(simple(n, vector_axis="out", vector_length=8), ranks, "row"))
            assert sum(shares) == n
            assert max(shares) <= -(-cells // ranks) * 8
            assert min(shares) >= min(cells // ranks * 8, n - 8 * (cells - 1))
