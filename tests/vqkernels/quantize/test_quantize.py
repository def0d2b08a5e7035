import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from vqkernels.errors import UnsupportedError
from vqkernels.parts import check_fit
from vqkernels.presets import PRESETS
from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import scaled_codebook, set_index

VQ = {"stages": (256,), "vector_length": 8}
PQ = {"stages": (256,), "vector_length": 4, "subspaces": 2, "method": "pq"}
RQ = {"stages": (256, 256), "vector_length": 8, "method": "rq"}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32"}
                        | fields)  # fmt: skip


def same(first, second):
    assert first.parts.keys() == second.parts.keys()
    for name, part in first.parts.items():
        assert torch.equal(part.float(), second.parts[name].float()), name


def error_of(weight, spec, **options):
    tensor = quantize(weight, spec, **options)
    tensor.validate()
    return relative_error(weight, tensor)


# --- what is stored is what was found ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_codes_are_the_nearest_of_the_stored_entries(dtype, axis):
    weight = normal(64, 48)
    spec = make(stages=(32, 8), codebook_dtype=dtype, vector_axis=axis)
    tensor = quantize(weight, spec, recipe=Recipe(beam=1, refits=0))
    tensor.validate()
    cells = (weight if axis == "in" else weight.T).reshape(-1, 4).double()
    codes = tensor.parts["codes"] if axis == "in" else tensor.parts["codes"].transpose(0, 1)
    for stage in range(2):
        book = scaled_codebook(spec, tensor.parts, stage, torch.float64)[0, 0]
        chosen = codes[..., stage].reshape(-1).long()
        errors = torch.cdist(cells, book)
        assert torch.allclose(errors.min(1).values, errors.gather(1, chosen[:, None])[:, 0])
        cells = cells - book[chosen]
    assert float(cells.square().sum() / weight.double().square().sum()) == pytest.approx(
        relative_error(weight, tensor), rel=1e-9
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_coarse_entries_are_coded_as_they_are_stored(dtype):
    weight = normal(64, 64) / 10 + 8  # bfloat16 is exact to 1/32 here, int8 to 1/16
    tensor = quantize(weight, make(stages=(64,), codebook_dtype=dtype))
    book = scaled_codebook(tensor.spec, tensor.parts, 0, torch.float64)[0, 0]
    best = torch.cdist(weight.double().reshape(-1, 4), book).square().min(1).values.sum()
    lost = (weight.double() - tensor.decode()).square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-4)


def test_stored_dtypes_cost_little():
    weight = normal(128, 64)
    errors = {
        dtype: error_of(weight, make(stages=(64, 64), codebook_dtype=dtype))
        for dtype in ("float32", "float16", "bfloat16", "int8")
    }
    for dtype, margin in (("float16", 1.005), ("bfloat16", 1.03), ("int8", 1.03)):
        assert errors[dtype] <= margin * errors["float32"]


def test_a_later_stage_codes_what_rounding_lost():
    # an int8 entry is a few parts in a thousand off; with a code a vector, stage 1 gets it back
    weight = normal(4, 16)
    one, two = (
        error_of(weight, make(stages=stages, codebook_dtype="int8")) for stages in ((16,), (16, 16))
    )
    assert 1e-7 < one < 1e-4
    assert two < 1e-3 * one


def test_int8_scales_follow_stages_and_books():
    weight = normal(64, 64) * torch.tensor([1.0, 100.0]).repeat_interleave(32)[:, None]
    spec = make(stages=(16, 16), codebook_dtype="int8", group_axis="row", group_size=32)
    tensor = quantize(weight, spec)
    tensor.validate()
    scale = tensor.parts["codebook_scale"]
    assert scale.shape == (2, 1, 2)
    assert (scale[1] > 20 * scale[0]).all()
    assert (scale[..., 1] < scale[..., 0]).all()
    for stage in range(2):
        peak = tensor.parts[f"codebook_{stage}"].int().abs().amax((1, 2, 3))
        assert peak.tolist() == [127, 127]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_an_all_zero_weight_is_exact(dtype):
    weight = torch.zeros(16, 16)
    for axis in ("none", "tensor", "row", "column"):
        tensor = quantize(weight, make(codebook_dtype=dtype, scale_axis=axis))
        tensor.validate()
        assert relative_error(weight, tensor) == 0
        assert (tensor.parts.get("codebook_scale", torch.ones(1)) == 1).all()


# --- subspaces, groups, scales ---


def test_subspaces_are_vq_of_their_columns():
    weight = normal(64, 64)
    weight[:, 4:8] *= 100
    weight[:, 12:16] *= 100
    tensor = quantize(weight, make(subspaces=2, method="pq"))
    tensor.validate()
    book = tensor.parts["codebook_0"]
    assert book.shape == (1, 2, 16, 4)
    picked = weight.reshape(64, 8, 2, 4)[:, :, 0].reshape(64, 32)
    # the first subspace draws the same numbers alone
    assert torch.equal(quantize(picked, make()).parts["codebook_0"][0, 0], book[0, 0])


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("group_axis", ["row", "column"])
def test_each_group_has_codebooks_of_its_own(axis, group_axis):
    block = torch.full((64,), 1.0)
    block[16:32], block[32:48], block[48:] = 1e-3, 1e3, 1e-2
    weight = normal(64, 64) * (block[:, None] if group_axis == "row" else block)
    spec = make(vector_axis=axis, group_axis=group_axis, group_size=16)
    tensor = quantize(weight, spec)
    tensor.validate()
    assert tensor.parts["codebook_0"].shape == (4, 1, 16, 4)
    decoded = tensor.decode()
    for group in range(4):
        part = slice(16 * group, 16 * group + 16)
        index = (part, slice(None)) if group_axis == "row" else (slice(None), part)
        lost = (weight[index] - decoded[index]).square().sum() / weight[index].square().sum()
        assert lost < 0.5  # with another group's codebook it is 1 or more


def test_per_channel():
    weight = normal(48, 128) * torch.logspace(-3, 3, 48)[:, None]
    tensor = quantize(weight, make(group_axis="row", group_size=1))
    tensor.validate()
    assert tensor.parts["codebook_0"].shape == (48, 1, 16, 4)
    lost = (weight - tensor.decode()).square().sum(1) / weight.square().sum(1)
    assert lost.max() < 0.4


def test_a_last_group_that_is_cut_short():
    weight = normal(40, 64)
    weight[32:] *= 1000
    tensor = quantize(weight, make(group_axis="row", group_size=16))
    tensor.validate()
    assert tensor.parts["codebook_0"].shape[0] == 3
    lost = (weight - tensor.decode()).square().sum(1) / weight.square().sum(1)
    assert lost.max() < 0.9
    assert relative_error(weight, tensor) < 0.4


def test_a_subspace_that_gets_no_vector():
    weight = normal(64, 12)  # three vectors a row, five subspaces
    tensor = quantize(weight, make(subspaces=5, method="pq"))
    tensor.validate()
    assert relative_error(weight, tensor) < 0.5


@pytest.mark.parametrize("axis", ["in", "out"])
def test_stride(axis):
    # every other feature is small: only strided vectors are all large or all small
    fine = torch.tensor([1.0, 0.001]).repeat(32)
    weight = normal(64, 64) * (fine if axis == "in" else fine[:, None])
    spec = make(vector_axis=axis, stride=2, subspaces=2, method="pq")
    tensor = quantize(weight, spec)
    tensor.validate()
    small = slice(1, None, 2)
    index = (slice(None), small) if axis == "in" else (small, slice(None))
    lost = (weight - tensor.decode())[index].square().sum() / weight[index].square().sum()
    assert lost < 0.5


@pytest.mark.parametrize("axis", ["row", "column"])
def test_scales_are_root_mean_squares(axis):
    sizes = torch.logspace(-2, 2, 32)
    weight = normal(32, 32) * (sizes[:, None] if axis == "row" else sizes)
    tensor = quantize(weight, make(scale_axis=axis, side_dtype="float32"))
    tensor.validate()
    rms = weight.square().mean(1 if axis == "row" else 0).sqrt()
    torch.testing.assert_close(tensor.parts["scale"], rms)
    assert tensor.parts["codebook_0"].abs().max() < 10


def test_a_tensor_scale_makes_codebooks_of_about_1():
    weight = normal(32, 32) * 1e-8  # which float16 entries can't hold
    tensor = quantize(weight, make(scale_axis="tensor", codebook_dtype="float16",
                                   side_dtype="float32"))  # fmt: skip
    tensor.validate()
    torch.testing.assert_close(tensor.parts["scale"][0], weight.square().mean().sqrt())
    assert relative_error(weight, tensor) < 0.5
    assert error_of(weight, make(codebook_dtype="float16")) > 0.5


def test_scaled_errors_count_in_units_of_the_weight():
    sizes = torch.logspace(0, 2, 64)[:, None]
    weight = normal(64, 64) * sizes
    scaled = error_of(weight, make(scale_axis="row"))
    # the same scales, but k-means that takes each row as equally important
    divided = quantize(weight / weight.square().mean(1, keepdim=True).sqrt(), make())
    decoded = divided.decode() * weight.square().mean(1, keepdim=True).sqrt()
    naive = float((weight - decoded).square().sum() / weight.square().sum())
    assert scaled < 0.97 * naive


def test_small_scales_keep_their_weight_in_the_error():
    weight = normal(64, 64) * torch.logspace(0, 2, 64)[:, None]
    spec = make(scale_axis="row", side_dtype="float32")
    # squares of these scales are below float32
    assert error_of(weight * 1e-27, spec) == pytest.approx(error_of(weight, spec), rel=0.02)


def test_a_scale_that_underflows_is_1():
    weight = normal(16, 16)
    weight[3] = 0
    weight[4] *= 1e-12
    tensor = quantize(weight, make(scale_axis="row"))
    tensor.validate()
    assert tensor.parts["scale"][3:5].tolist() == [1, 1]


# --- importance ---


def test_importance_of_an_input_feature():
    weight, importance = normal(128, 32), torch.ones(32)
    importance[:4] = 100
    plain, weighted = quantize(weight, make()), quantize(weight, make(), weights=importance)

    def lost(tensor):
        return (weight - tensor.decode()).square().sum(0)

    assert lost(weighted)[:4].sum() < 0.8 * lost(plain)[:4].sum()
    assert lost(weighted).sum() > lost(plain).sum()


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("scale_axis", ["none", "row", "column"])
def test_importance_lowers_its_own_error(axis, scale_axis):
    weight, importance = normal(64, 64), normal(64, 64, seed=1).mul(2).exp()
    spec = make(stages=(16, 16), vector_axis=axis, scale_axis=scale_axis)
    errors = [
        float(((weight - quantize(weight, spec, weights=w).decode()).square() * importance).sum())
        for w in (None, importance)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_padding_takes_no_part():
    # 6 of 8: were the last 2 coded as zeros, entries would be spent on them
    weight = normal(512, 6)
    padded = make(vector_length=8, stages=(64,))
    whole = make(vector_length=6, stages=(64,))
    assert error_of(weight, padded) == pytest.approx(error_of(weight, whole), rel=0.03)
    # columns 8 and 9 share a vector with padding, and its codebook with whole vectors
    ragged = normal(512, 10)
    assert error_of(ragged, padded) < 0.42  # 0.45 where padding counts as zeros


# --- relative error, determinism, presets, shapes ---


def test_relative_error_is_the_definition():
    weight = normal(64, 48)
    tensor = quantize(weight, make())
    exact, decoded = weight.double(), tensor.decode()
    expected = sum((exact - decoded).flatten().pow(2).tolist())
    assert relative_error(weight, tensor) == pytest.approx(
        expected / sum(exact.flatten().pow(2).tolist()), rel=1e-12
    )
    assert relative_error(decoded, tensor) == 0
    assert relative_error(torch.zeros(64, 48), tensor) == math.inf


@pytest.mark.parametrize("fields", [RQ, PQ, {**VQ, "scale_axis": "tensor", "vector_length": 9}])
def test_same_bits_on_any_number_of_threads(threads, fields):
    weight = normal(256, 256)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(quantize(weight, make(**fields), recipe=Recipe(iterations=4)))
    same(*found)


def test_the_seed_decides():
    weight = normal(64, 64)
    same(quantize(weight, make()), quantize(weight, make(), seed=0))
    other = quantize(weight, make(), seed=1)
    assert not torch.equal(quantize(weight, make()).parts["codebook_0"], other.parts["codebook_0"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name):
    # smaller codebooks, so that a small weight holds them; all else as the preset has it
    spec = PRESETS[name]
    small = dataclasses.replace(
        spec, stages=tuple(min(entries, 16) for entries in spec.stages), code_bits=()
    )
    weight = normal(64, 768)
    tensor = quantize(weight, small, bias=normal(64))
    tensor.validate()
    assert tensor.spec == small
    assert tensor.bias is not None
    assert relative_error(weight, tensor) < 0.93


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    length=st.integers(1, 9),
    stride=st.integers(1, 2),
    subspaces=st.integers(1, 3),
    axis=st.sampled_from(["in", "out"]),
    width=st.integers(1, 3),
    group=st.sampled_from([("tensor", 0), ("row", 1), ("row", 2), ("column", 1), ("column", 2)]),
    scale=st.sampled_from(["none", "tensor", "row", "column"]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    entries=st.integers(1, 9),
)
@settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much],  # many layers can't hold the format
)
def test_any_shape(n, k, length, stride, subspaces, axis, width, group, scale, dtype, entries):
    group_axis, blocks = group
    width = width if axis == "in" else 1
    along = (group_axis == "column") == (axis == "in")
    fields = {
        "vector_length": length, "stride": stride, "subspaces": subspaces, "vector_axis": axis,
        "group_axis": group_axis, "vector_width": width,
        "group_size": blocks * (length * stride if along else width),
        "scale_axis": scale, "codebook_dtype": dtype,
    }  # fmt: skip
    weight = normal(n, k, seed=n * 41 + k)
    try:
        check_fit(make(stages=(entries,), **fields), n, k)
    except UnsupportedError:
        reject()
    greedy = Recipe(iterations=4, beam=1, refits=0)
    errors = []
    for stages in ((entries,), (entries, entries), (entries,) * 3):
        tensor = quantize(weight, make(stages=stages, **fields), recipe=greedy)
        tensor.validate()
        errors.append(relative_error(weight, tensor))
    assert errors[1] <= errors[0] * 1.0001 + 1e-9
    assert errors[2] <= errors[1] * 1.0001 + 1e-9
    together = Recipe(iterations=4, refits=1)
    tensor = quantize(weight, make(stages=(entries, entries), **fields), recipe=together)
    tensor.validate()
    assert relative_error(weight, tensor) <= errors[1] * 1.0001 + 1e-9


def test_codes_and_books_agree_with_the_decoder():
    # written out by hand, against the decoder that the rest of the library trusts
    spec = make(subspaces=2, group_axis="column", group_size=16, method="pq")
    weight = normal(20, 40)
    tensor = quantize(weight, spec)
    which = set_index(spec, 20, 40).expand(20, 10)
    books = tensor.parts["codebook_0"].reshape(-1, 16, 4)
    for row, column in ((0, 0), (3, 5), (19, 9)):
        vector = weight[row, 4 * column : 4 * column + 4]
        errors = (books[which[row, column]] - vector).square().sum(1)
        assert int(tensor.parts["codes"][row, column, 0]) == int(errors.argmin())


def test_coefficients_of_1_are_as_none():
    weight = normal(64, 64)
    same(quantize(weight, make(coefficients=(1.0,))), quantize(weight, make()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_views_are_taken_as_they_are(dtype):
    weight = normal(64, 128).to(dtype).requires_grad_()
    view = weight.T[::2]
    same(quantize(view, make()), quantize(view.detach().float().contiguous(), make()))
    assert weight.grad is None
