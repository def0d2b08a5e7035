import dataclasses

import numpy as np
import pytest
import torch
from sklearn.preprocessing import MaxAbsScaler, StandardScaler, normalize

from vqkernels.errors import UnsupportedError
from vqkernels.quantize import Recipe, clip_limits, encode, quantize, relative_error
from vqkernels.quantize.scales import error_units, fit_scales, normalise
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32",
                           "side_dtype": "float32"} | fields)  # fmt: skip


def normalised(weight, scaling, **fields):
    spec = make(**fields)
    return normalise(spec, weight, fit_scales(spec, weight, scaling))


# rows and columns of many sizes, away from 0
WEIGHT = (normal(24, 16) + 3) * torch.logspace(-2, 2, 16) * torch.logspace(-1, 1, 24)[:, None]


@pytest.mark.parametrize("axis", ["row", "column", "tensor"])
def test_z_score_is_scikit_learns(axis):
    shaped = {"row": WEIGHT.T, "column": WEIGHT, "tensor": WEIGHT.reshape(-1, 1)}[axis]
    expected = StandardScaler().fit_transform(shaped.double().numpy())
    expected = expected.T if axis == "row" else expected.reshape(24, 16)
    for scaling in ("std", "rms"):  # the same, around a mean
        found = normalised(WEIGHT, scaling, scale_axis=axis, zero_axis=axis)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_standard_deviation_without_a_zero():
    found = normalised(WEIGHT, "std", scale_axis="column")
    expected = StandardScaler(with_mean=False).fit_transform(WEIGHT.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("scaling", "norm"), [("l2", "l2"), ("max", "max")])
def test_l2_and_largest_are_scikit_learns(scaling, norm):
    found = normalised(WEIGHT, scaling, scale_axis="row")
    np.testing.assert_allclose(found.numpy(), normalize(WEIGHT.numpy(), norm), rtol=1e-5)
    found = normalised(-WEIGHT, "max", scale_axis="column")
    np.testing.assert_allclose(
        found.numpy(), MaxAbsScaler().fit_transform(-WEIGHT.numpy()), rtol=1e-5
    )


@pytest.mark.parametrize("axis", ["row", "column", "tensor"])
def test_a_zero_alone_centres(axis):
    spec = make(zero_axis=axis)
    parts = fit_scales(spec, WEIGHT, "rms")
    along = {"row": 1, "column": 0, "tensor": (0, 1)}[axis]
    torch.testing.assert_close(parts["zero"], WEIGHT.mean(along).reshape(-1))
    left = normalise(spec, WEIGHT, parts)
    assert float(left.mean(along).abs().max()) < 1e-5 * float(WEIGHT.abs().max())


def test_layer_norm_is_torchs():
    found = normalised(WEIGHT, "std", scale_axis="row", zero_axis="row")
    expected = torch.nn.functional.layer_norm(WEIGHT.double(), (16,), eps=0)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["none", "tensor", "row", "column"])
@pytest.mark.parametrize("zero", ["none", "tensor", "row", "column"])
def test_what_is_stored_is_what_was_used(scale, zero):
    # bfloat16 moves scale and zero by up to 0.4 %; the decoder's formula gives the weight back
    spec = make(scale_axis=scale, zero_axis=zero, side_dtype="bfloat16")
    weight = normal(24, 16) + 3
    parts = fit_scales(spec, weight, "std")
    assert all(part.dtype == torch.bfloat16 for part in parts.values())
    left = normalise(spec, weight, parts).double()
    for name, axis in (("scale", scale), ("zero", zero)):
        if axis != "none":
            values = parts[name].double()
            values = values[:, None] if axis == "row" else values
            left = left * values if name == "scale" else left + values
    torch.testing.assert_close(left, weight.double(), rtol=1e-6, atol=1e-6)


def test_columns_left_out_take_no_part_in_a_rows_statistics():
    weight = normal(8, 12)
    weight[:, [1, 7]] *= 1000
    main = torch.tensor([column for column in range(12) if column not in (1, 7)])
    for axis in ("row", "tensor"):
        spec = make(scale_axis=axis, zero_axis=axis)
        found = fit_scales(spec, weight, "std", main)
        alone = fit_scales(spec, weight[:, main], "std")
        assert torch.equal(found["scale"], alone["scale"])
        assert torch.equal(found["zero"], alone["zero"])
    spec = make(scale_axis="column")
    assert fit_scales(spec, weight, "std", main)["scale"].shape == (12,)


def test_error_units_are_relative_to_the_largest():
    spec = make(scale_axis="row")
    row, column = error_units(spec, {"scale": torch.tensor([2.0, 8.0, 4.0])})
    assert row.tolist() == [0.25, 1, 0.5]
    assert column is None
    row, column = error_units(make(scale_axis="column"), {"scale": torch.tensor([1.0, -2.0])})
    assert (row, column.tolist()) == (None, [0.5, 1])
    assert error_units(make(scale_axis="tensor"), {"scale": torch.ones(1)}) == (None, None)


def test_constant_rows_and_columns():
    weight = torch.arange(1.0, 17)[:, None].expand(16, 16).contiguous()
    for axis in ("row", "column", "tensor"):
        for scaling in ("rms", "std", "l2", "max"):
            spec = make(stages=(4,), scale_axis=axis, zero_axis="row")
            tensor = quantize(weight, spec, recipe=Recipe(scaling=scaling))
            tensor.validate()
            assert relative_error(weight, tensor) == 0


def test_a_scale_of_another_tensor_may_be_0():
    spec = make(scale_axis="row")
    weight = normal(16, 16)
    tensor = quantize(weight, spec)
    scale = tensor.parts["scale"].clone()
    scale[3] = 0
    again = encode(weight, tensor.replace_parts(scale=scale))
    again.validate()
    assert torch.equal(again.decode()[4:], tensor.decode()[4:])
    assert (again.decode()[3] == 0).all()


def test_a_zero_beyond_float16_is_refused():
    with pytest.raises(UnsupportedError, match="side_dtype float16 can't hold"):
        quantize(normal(16, 16) + 1e6, make(zero_axis="row", side_dtype="float16"))


# --- limits ---


def test_limits_are_numpys_percentiles():
    weight = normal(40, 50)
    limits = clip_limits(weight, Recipe(clip=2.5))
    assert limits == tuple(np.percentile(weight.numpy(), [2.5, 97.5]).tolist())
    assert clip_limits(weight.to(torch.float64), Recipe(clip=2.5)) == limits
    assert clip_limits(weight, Recipe()) is None


def test_limits_bound_the_codebook_and_not_what_is_coded():
    weight = normal(64, 64)
    weight[::9, ::7] *= 50
    spec = make(stages=(64,), vector_length=1, scale_axis="tensor")
    recipe = Recipe(clip=3.0)
    tensor = quantize(weight, spec, recipe=recipe)
    low, high = clip_limits(weight, recipe)
    entries = tensor.parts["codebook_0"] * tensor.parts["scale"]
    assert low * 1.001 <= float(entries.min()) < float(entries.max()) <= high * 1.001
    # an extreme weight has the entry nearest to it, which is the largest
    top = int(weight.argmax())
    assert tensor.decode().flatten()[top] == tensor.decode().max()
    # what isn't extreme is served better
    inside = (weight > low) & (weight < high)
    plain = quantize(weight, spec).decode()
    lost, before = ((weight - d)[inside].square().sum() for d in (tensor.decode(), plain))
    assert lost < 0.5 * before
    same = quantize(weight, spec, recipe=dataclasses.replace(recipe, clip=0.0)).decode()
    assert torch.equal(same, plain)


def test_codes_are_of_the_unlimited_weight():
    weight = normal(64, 64).pow(3)
    tensor = quantize(weight, make(), recipe=Recipe(clip=10.0))
    limits = clip_limits(weight, Recipe(clip=10.0))
    assert torch.equal(encode(weight, tensor).parts["codes"], tensor.parts["codes"])
    assert not torch.equal(
        encode(weight.clamp(*limits), tensor).parts["codes"], tensor.parts["codes"]
    )
