import pytest
import torch

from vqkernels.quantize import quantize, relative_error
from vqkernels.quantize.codebook import rounded, store
from vqkernels.quantize.layout import Vectors
from vqkernels.quantize.rounding import RoundingCost, rounding_cost
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "int8"} | fields)


def vectors_of(points, weights=None):
    return Vectors(points, weights, torch.arange(points.shape[1])[None])


def lost(vectors, stage):
    squares = (vectors.points - stage.decode()).double().square()
    return float(
        squares.sum() if vectors.weights is None else (squares.sum(-1) * vectors.weights).sum()
    )


# --- int8 entries ---


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_is_the_best_of_any(weighted):
    entries = normal(1, 64, 4)
    entries[0, 0] *= 4  # one long entry, which a smaller scale would clamp
    mass = normal(1, 64, 1, seed=1).mul(3).exp() if weighted else torch.ones(1, 64, 1)
    mass[0, 0] = 1e-4
    values, scale = rounded(entries, "int8", mass=mass)

    def error(of):
        steps = (entries / of).round().clamp(-127, 127)
        return float(((steps * of - entries).double().square() * mass).sum())

    largest = float(entries.abs().max()) / 127
    best = min(error(largest * share) for share in torch.linspace(0.625, 1, 13).tolist())
    assert error(float(scale)) <= best * (1 + 1e-9)
    assert error(float(scale)) < 0.6 * error(largest)
    assert torch.equal(values.float(), (entries / scale).round().clamp(-127, 127))


def test_entries_are_solved_for_again_after_rounding():
    points = normal(1, 2000, 4) + 20  # int8 steps of a sixth, of entries that differ by about 1
    found = store(vectors_of(points), points[:, :64].clone(), "int8")
    plain, scale = rounded(points[:, :64], "int8")
    nearest = torch.cdist(points[0], plain[0].float() * scale).square().amin(1).sum()
    assert lost(vectors_of(points), found) < 0.97 * float(nearest)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("coefficient", [0.25, -3.0])
def test_entries_are_stored_over_the_coefficient(dtype, coefficient):
    weight = normal(128, 64)
    plain = quantize(weight, make(codebook_dtype=dtype, stages=(16, 16)))
    factors = (coefficient, 1.0)
    scaled = quantize(weight, make(codebook_dtype=dtype, stages=(16, 16), coefficients=factors))
    scaled.validate()
    assert relative_error(weight, scaled) == pytest.approx(relative_error(weight, plain), rel=0.02)
    if dtype == "float32":
        entries = scaled.parts["codebook_0"] * coefficient
        torch.testing.assert_close(entries, plain.parts["codebook_0"])


# --- what rounding costs ---


def test_int8_costs_what_float32_entries_would_save():
    weight = normal(256, 64) + 10  # 2000 to a step: int8 is coarse here
    tensor = quantize(weight, make(stages=(64,)))
    cost = rounding_cost(weight, tensor)
    assert cost.stored == pytest.approx(relative_error(weight, tensor), rel=1e-5)
    # by hand: the mean of each code's vectors
    cells, codes = weight.reshape(-1, 4).double(), tensor.parts["codes"].reshape(-1).long()
    means = torch.stack([cells[codes == code].mean(0) for code in range(64)])
    best = (cells - means[codes]).square().sum() / cells.square().sum()
    assert cost.float32 == pytest.approx(float(best), rel=1e-5)
    assert cost.ratio > 1.0005


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": (16, 8)},
        {"scale_axis": "row", "stages": (16, 16)},
        {"vector_length": 5, "subspaces": 3},
        {"rotation_size": 16, "side_dtype": "float32"},
    ],
)
def test_float32_entries_cost_nothing(fields):
    weight = normal(96, 48)
    tensor = quantize(weight, make(codebook_dtype="float32", **fields))
    cost = rounding_cost(weight, tensor)
    assert cost.float32 <= cost.stored
    assert cost.stored == pytest.approx(relative_error(weight, tensor), rel=1e-3)
    assert rounding_cost(weight, quantize(weight, make(**fields))).ratio < 1.1


def test_weights_count():
    weight, importance = normal(64, 48), normal(48, seed=1).mul(2).exp()
    tensor = quantize(weight, make(), weights=importance)
    squares = (weight - tensor.decode()).square() * importance
    expected = float(squares.sum() / (weight.double().square() * importance).sum())
    assert rounding_cost(weight, tensor, weights=importance).stored == pytest.approx(expected, 1e-5)


def test_an_all_zero_weight_costs_nothing():
    weight = torch.zeros(16, 16)
    assert rounding_cost(weight, quantize(weight, make())) == RoundingCost(0.0, 0.0)
    assert RoundingCost(0.0, 0.0).ratio == 1
    assert RoundingCost(0.5, 0.0).ratio == float("inf")
