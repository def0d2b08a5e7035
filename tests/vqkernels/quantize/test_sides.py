import itertools

import numpy as np
import pytest
import torch

from vqkernels.errors import UnsupportedError
from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.quantize.sides import column_scores, fit_uniform, stored_order, uniform_codes
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32",
                           "side_dtype": "float32"} | fields)  # fmt: skip


# --- which columns ---


def test_the_largest_columns_are_kept_out():
    weight = normal(64, 40)
    weight[:, [31, 5, 18]] *= torch.tensor([30.0, 50.0, 20.0])
    tensor = quantize(weight, make(outlier_columns=2, uniform_columns=1, permuted=True))
    tensor.validate()
    order = tensor.parts["permutation"].tolist()
    assert order[:3] == [5, 31, 18]
    assert sorted(order) == list(range(40))
    assert torch.equal(tensor.parts["outliers"], weight[:, [5, 31]])


def test_the_hessian_decides_where_there_is_one():
    weight = normal(64, 32)
    weight[:, 3] *= 2
    importance = torch.ones(32)
    importance[20] = 9
    spec = make(outlier_columns=1, permuted=True)

    def first(**options):
        return int(quantize(weight, spec, **options).parts["permutation"][0])

    assert first() == 3
    assert first(weights=importance) == 20
    assert first(hessian=torch.diag(importance)) == 20
    assert first(weights=importance, recipe=Recipe(sides="magnitude")) == 3
    assert first(recipe=Recipe(sides="hessian")) == 3  # without one, all count the same


def test_scores_are_weighted_squares():
    weight, weights = normal(12, 8), normal(12, 8, seed=1).square()
    squares = weight.double().square()
    for by, expected in (
        ("magnitude", squares.sum(0)),
        ("hessian", (squares * weights).sum(0)),
        ("auto", (squares * weights).sum(0)),
        ("error", (squares * weights).sum(0) / 4),
    ):
        found = column_scores(weight, weights, by, lambda: weight / 2)
        torch.testing.assert_close(found, expected)


def test_main_columns_are_dealt_out_to_vectors():
    scores = torch.tensor([5.0, 9, 1, 7, 3, 8, 2, 6, 4])  # two sides, then two vectors of 3 and 1
    order = stored_order(make(vector_length=3, outlier_columns=1, uniform_columns=1), scores)
    assert scores[order].tolist() == [9, 8, 7, 4, 2, 6, 3, 1, 5]
    # every other element is the same vector's; 3 of 4 places in the second are padding
    order = stored_order(make(vector_length=2, stride=2), scores[:5])
    assert scores[order].tolist() == [9, 7, 3, 1, 5]
    for fields in ({"vector_axis": "out"}, {"rotation_size": 7}):
        order = stored_order(make(**fields, outlier_columns=2), scores)
        assert order.tolist() == [1, 5, 0, 2, 3, 4, 6, 7, 8]
    # of equals, the first
    assert stored_order(make(vector_length=1), torch.ones(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("weighted", [False, True])
def test_dealt_columns_are_coded_better(weighted):
    sizes = torch.exp(0.5 * normal(64, seed=4))
    weight = normal(256, 64) * (1 if weighted else sizes)
    weights = sizes.square() if weighted else None
    errors = [
        float(((weight - tensor.decode()).square() * sizes.square() ** weighted).sum())
        for tensor in (
            quantize(weight, make(stages=(64,), permuted=permuted), weights=weights)
            for permuted in (False, True)
        )
    ]
    assert errors[1] < 0.9 * errors[0]


def test_main_columns_make_up_for_what_sides_lose():
    inputs = normal(500, 32, seed=1) @ (normal(32, 32, seed=2) + 2)
    hessian, weight = inputs.T @ inputs, normal(128, 32)
    spec = make(stages=(64,), vector_length=1, uniform_columns=6, uniform_bits=2, permuted=True)

    def lost(propagate):
        recipe = Recipe(propagate=propagate)
        error = weight - quantize(weight, spec, hessian=hessian, recipe=recipe).decode()
        return float(torch.einsum("ri,ij,rj->", error, hessian.double(), error))

    assert lost(True) < 0.2 * lost(False)


def test_columns_away_from_0_are_no_outliers_once_a_zero_is_taken_off():
    weight = normal(64, 32)
    weight[:, 7] += 50
    weight[:, 9] *= 4
    spec = make(outlier_columns=1, permuted=True, zero_axis="column")
    assert int(quantize(weight, spec).parts["permutation"][0]) == 9


@pytest.mark.parametrize("by", ["magnitude", "error"])
def test_the_choice_is_as_good_as_trying_all(by):
    weight = normal(256, 8)
    weight[:, [2, 6]] *= 4
    weight[:, 4] = weight[:, 4].sign() * 3  # large, but two entries hold it
    fields = {"stages": (4,), "vector_length": 1, "outlier_columns": 2, "group_axis": "column",
              "group_size": 1}  # fmt: skip
    errors = {}
    for pair in itertools.combinations(range(8), 2):
        order = [*pair, *(c for c in range(8) if c not in pair)]
        errors[pair] = relative_error(weight[:, order], quantize(weight[:, order], make(**fields)))
    tensor = quantize(weight, make(**fields, permuted=True), recipe=Recipe(sides=by))
    chosen = tuple(sorted(tensor.parts["permutation"][:2].tolist()))
    assert min(errors, key=errors.get) == chosen == (2, 6)
    assert relative_error(weight, tensor) == pytest.approx(errors[chosen], rel=0.05)


def test_the_error_sees_what_magnitude_does_not():
    weight = normal(256, 8)
    weight[:, 4] = weight[:, 4].sign() * 9
    weight[:, 2] *= 2
    spec = make(stages=(4,), vector_length=1, outlier_columns=1, permuted=True,
                group_axis="column", group_size=1)  # fmt: skip
    first = {by: int(quantize(weight, spec, recipe=Recipe(sides=by)).parts["permutation"][0])
             for by in ("magnitude", "error")}  # fmt: skip
    assert first == {"magnitude": 4, "error": 2}


def test_without_a_permutation_the_leading_columns_are_taken():
    weight = normal(32, 16)
    weight[:, 9] *= 100
    tensor = quantize(weight, make(outlier_columns=2, uniform_columns=1))
    tensor.validate()
    assert torch.equal(tensor.parts["outliers"], weight[:, :2])


# --- how they are stored ---


def test_outliers_are_dense_in_side_dtype():
    weight = normal(64, 32)
    weight[:, 4] *= 1000
    for dtype in ("float16", "bfloat16"):
        tensor = quantize(weight, make(outlier_columns=1, permuted=True, side_dtype=dtype))
        kept = weight[:, 4].to(getattr(torch, dtype))
        assert torch.equal(tensor.parts["outliers"][:, 0], kept)
        assert torch.equal(tensor.decode()[:, 4], kept.double())
    with pytest.raises(UnsupportedError, match="float16 can't hold"):
        quantize(weight * 1000, make(outlier_columns=1, permuted=True, side_dtype="float16"))


def test_outliers_are_kept_in_units_of_the_scale():
    weight = normal(64, 32) * torch.logspace(-2, 2, 64)[:, None]
    weight[:, 4] *= 1000
    tensor = quantize(weight, make(outlier_columns=1, permuted=True, scale_axis="row"))
    rms = weight[:, [c for c in range(32) if c != 4]].square().mean(1).sqrt()
    torch.testing.assert_close(tensor.parts["scale"], rms)
    torch.testing.assert_close(tensor.decode()[:, 4].float(), weight[:, 4])


def test_outliers_by_a_codebook_of_their_own():
    weight = normal(66, 32)  # no whole number of vectors
    weight[:, [3, 30]] *= 100
    fields = {"outlier_columns": 2, "outlier_entries": 32, "outlier_vector_length": 4}
    spec = make(**fields, permuted=True)
    importance = torch.ones(66, 32)
    importance[:8] = 100
    errors = []
    for weights in (None, importance):
        tensor = quantize(weight, spec, weights=weights)
        tensor.validate()
        assert tensor.parts["outlier_codes"].shape == (17, 2)
        lost = (weight - tensor.decode())[:, [3, 30]].square()
        assert lost.sum() < 0.2 * weight[:, [3, 30]].square().sum()
        errors.append(float((lost * importance[:, :2]).sum()))
        book = tensor.parts["outlier_codebook"].double()
        stored = weight[:, tensor.parts["permutation"].long()[:2]].double()
        cells = stored[:64].reshape(16, 4, 2).transpose(1, 2).reshape(-1, 4)
        best = torch.cdist(cells, book).argmin(1)
        assert torch.equal(tensor.parts["outlier_codes"][:16].flatten().long(), best)
    assert errors[1] < 0.5 * errors[0]


# --- uniform columns ---


def lost_by(column, scale, zero, top, weights=1.0):
    codes = np.rint((column - zero) / scale).clip(0, top)
    return (weights * (column - codes * scale - zero) ** 2).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_uniform_scales_are_as_good_as_a_scan_of_all(bits, weighted):
    column = normal(64, 1, seed=bits)
    column[5] = 6
    weights = normal(64, 1, seed=9).square() if weighted else None
    scale, zero = fit_uniform(column, weights, bits, "float32")
    values, top = column[:, 0].double().numpy(), (1 << bits) - 1
    each = 1.0 if weights is None else weights[:, 0].double().numpy()
    reach = values.max() - values.min()
    scan = min(
        lost_by(values, step, start, top, each)
        for step in np.linspace(0.02, 1, 100) * reach / top
        for start in np.linspace(values.min(), values.max(), 100)
    )
    found = lost_by(values, float(scale), float(zero), top, each)
    assert found <= 1.02 * scan
    plain = lost_by(values, reach / top, values.min(), top, each)
    assert found <= (0.8 if bits < 4 else 1) * plain  # what the extremes alone give


def test_uniform_columns_decode_to_within_half_a_step():
    weight = normal(64, 16) * torch.logspace(-3, 3, 16)
    weight[:, 2] = 5  # which no scale is needed for
    tensor = quantize(weight, make(uniform_columns=15, uniform_bits=8, vector_length=1))
    tensor.validate()
    scale = tensor.parts["uniform_scale"].double()
    lost = (weight - tensor.decode())[:, :15].abs()
    assert float(lost[:, 2].max()) == 0
    assert (lost <= 0.51 * scale).double().mean() > 0.97
    assert (lost.square().sum(0) <= weight[:, :15].double().square().sum(0) * 1e-4).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_uniform_scale_and_zero_are_judged_as_stored(dtype):
    columns = normal(64, 4) * 1e-4 + torch.tensor([0.0, 1, -100, 3])
    scale, zero = fit_uniform(columns, None, 8, dtype)
    assert scale.dtype == zero.dtype == getattr(torch, dtype)
    assert (scale > 0).all()
    codes = uniform_codes(columns, scale, zero, 8)
    lost = (columns - codes * scale.double() - zero.double()).square().sum(0)
    # never worse than the stored mean alone, or one step of it off
    step = torch.finfo(scale.dtype).eps * columns.abs().amax(0)
    assert (lost.sqrt() <= 8 * (step + 1e-4)).all()


def test_uniform_values_beyond_float16_are_refused():
    with pytest.raises(UnsupportedError, match="float16 can't hold"):
        quantize(normal(16, 16) * 1e8, make(uniform_columns=1, side_dtype="float16"))


def test_columns_that_weigh_nothing():
    weight, importance = normal(32, 16), torch.zeros(16)
    importance[8:] = 1
    for fields in ({"outlier_entries": 4, "outlier_vector_length": 4}, {}):
        spec = make(outlier_columns=2, uniform_columns=2, **fields)
        tensor = quantize(weight, spec, weights=importance)
        tensor.validate()
        assert float((weight - tensor.decode())[:, 8:].square().mean()) < 1


def test_same_bits_on_any_number_of_threads(threads):
    weight, inputs = normal(96, 72), normal(300, 72, seed=1)
    spec = make(outlier_columns=4, outlier_entries=8, outlier_vector_length=4, uniform_columns=4,
                permuted=True, scale_axis="row", zero_axis="column", rotation_size=16)  # fmt: skip
    for recipe in (Recipe(iterations=3), Recipe(iterations=3, sides="error", clip=1.0)):
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(quantize(weight, spec, hessian=inputs.T @ inputs, recipe=recipe).parts)
        for name, part in found[0].items():
            assert torch.equal(part.float(), found[1][name].float()), name
