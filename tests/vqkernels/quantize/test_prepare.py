"""What a target says an error costs, against its cost in the weight itself."""

import pytest
import torch

from vqkernels.quantize import Recipe
from vqkernels.quantize.prepare import prepare
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import decode_sides

N, K = 24, 40


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = normal(N, K) * torch.logspace(-1, 1, K) * torch.logspace(-1, 1, N)[:, None] + 1


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "side_dtype": "float32"} | fields)


def decoded(spec, parts, main):
    """The decoder's formula: main columns as coded, float64, to the weight."""
    if spec.rotation_size:
        blocks = main.reshape(len(main), -1, spec.rotation_size)
        main = (blocks @ parts["rotation"].double()).reshape(len(main), -1)
    sides = [decode_sides(len(main), parts, torch.float64)] if spec.side_columns else []
    stored = torch.cat([*sides, main], dim=1)
    if spec.permuted:
        order = parts["permutation"].long()
        stored = stored[:, order.argsort()]
    for name, axis in (("scale", spec.scale_axis), ("zero", spec.zero_axis)):
        if axis != "none":
            values = parts[name].double()
            values = values[:, None] if axis == "row" else values
            stored = stored * values if name == "scale" else stored + values
    return stored


SPECS = {
    "plain": {},
    "row": {"scale_axis": "row", "zero_axis": "row"},
    "column": {"scale_axis": "column", "zero_axis": "column"},
    "tensor": {"scale_axis": "tensor", "zero_axis": "tensor"},
    "rotated": {"rotation_size": 8},
    "sides": {"outlier_columns": 3, "uniform_columns": 5, "permuted": True},
    "leading": {"outlier_columns": 3, "uniform_columns": 5},
    "all": {
        "scale_axis": "row", "zero_axis": "column", "rotation_size": 16, "outlier_columns": 4,
        "uniform_columns": 4, "uniform_bits": 3, "permuted": True,
    },
    "all-column": {
        "scale_axis": "column", "zero_axis": "row", "rotation_size": 32, "outlier_columns": 8,
        "outlier_entries": 4, "outlier_vector_length": 2, "permuted": True,
    },
}  # fmt: skip


def prepared(spec, weight, **recipe):
    return prepare(spec, weight, Recipe(propagate=False, **recipe), seed=0,
                   errors=lambda: weight.matrix)  # fmt: skip


def ratios(spec, target, parts, cost, told):
    """What three random errors cost in the weight, over what the target says."""
    exact = decoded(spec, parts, target.matrix.double())
    found = []
    for seed in range(3):
        error = normal(*target.matrix.shape, seed=seed + 7).double() * 0.1
        moved = decoded(spec, parts, target.matrix.double() + error) - exact
        found.append(float(cost(moved)) / float(told(error)))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_without_an_error_it_decodes_to_the_weight(name):
    spec = make(**SPECS[name])
    target, parts = prepared(spec, Target(WEIGHT))
    lost = (decoded(spec, parts, target.matrix.double()) - WEIGHT.double()).abs()
    side = parts["permutation"].long()[: spec.side_columns] if spec.permuted else (
        torch.arange(spec.side_columns))  # fmt: skip
    main = torch.ones(K, dtype=torch.bool)
    main[side] = False
    assert float(lost[:, main].max()) < 1e-5
    assert target.matrix.shape == (N, K - spec.side_columns)


@pytest.mark.parametrize("rotation", ["hadamard", "whitening"])
@pytest.mark.parametrize("name", SPECS)
def test_an_error_costs_what_the_hessian_says(name, rotation):
    spec, inputs = make(**SPECS[name]), normal(100, K, seed=1)
    hessian = inputs.T @ inputs
    weight = Target(WEIGHT, hessian.diagonal().expand(N, K), hessian)
    target, parts = prepared(spec, weight, rotation=rotation)
    rows = torch.ones(N) if target.rows is None else target.rows
    found = ratios(
        spec,
        target,
        parts,
        lambda e: torch.einsum("ri,ij,rj->", e, hessian.double(), e),
        lambda e: torch.einsum("ri,ij,rj,r->", e, target.hessian.double(), e, rows.double()),
    )
    # the same factor whatever the error: the square of the largest scale
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)
    torch.testing.assert_close(
        target.weights, (target.hessian.diagonal() * rows[:, None]).expand(target.weights.shape)
    )
    largest = float(parts["scale"].max()) if spec.scale_axis in ("row", "column") else 1.0
    if spec.scale_axis == "tensor":
        largest = float(parts["scale"])
    assert found[0] == pytest.approx(largest**2, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in SPECS if "rotation_size" not in SPECS[name]])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_error_costs_what_the_weights_say(name, weighted):
    spec = make(**SPECS[name])
    weights = normal(N, K, seed=1).square() if weighted else None
    target, parts = prepared(spec, Target(WEIGHT, weights))
    counted = torch.ones(N, K - spec.side_columns) if target.weights is None else target.weights
    found = ratios(
        spec,
        target,
        parts,
        lambda e: (e.square() * (1 if weights is None else weights)).sum(),
        lambda e: (e.square() * counted).sum(),
    )
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_of_rotated_weights_the_diagonal_is_kept():
    spec = make(**SPECS["all"])
    weights = normal(N, K, seed=1).square()
    target, parts = prepared(spec, Target(WEIGHT, weights))
    exact, main = target.matrix.double(), target.matrix.double()
    ratio = []
    for column in (0, 5, 31):
        error = torch.zeros_like(main)
        error[:, column] = normal(N, seed=column).double()
        moved = decoded(spec, parts, main + error) - decoded(spec, parts, exact)
        ratio.append(
            float((moved.square() * weights).sum() / (error.square() * target.weights).sum())
        )
    assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_a_limited_weight_goes_the_same_way(name):
    spec = make(**SPECS[name])
    target, parts = prepared(spec, Target(WEIGHT), clip=5.0)
    low, high = torch.quantile(WEIGHT, torch.tensor([0.05, 0.95])).tolist()
    back = decoded(spec, parts, target.limited.double())
    order = parts["permutation"].long() if spec.permuted else torch.arange(K)
    main = order[spec.side_columns :]
    torch.testing.assert_close(
        back[:, main], WEIGHT.double().clamp(low, high)[:, main], rtol=1e-4, atol=1e-5
    )
    training = target.training()
    assert training.limited is None
    assert torch.equal(training.matrix, target.limited)
    assert prepared(spec, Target(WEIGHT))[0].limited is None


def test_a_cosine_counts_a_vector_by_its_mean_weight():
    target = Target(normal(4, 6), normal(4, 6, seed=1).square())
    weights = torch.nn.functional.pad(target.weights, (0, 2)).reshape(-1, 4)
    found = target.vectors(make(distance="cosine")).weights
    torch.testing.assert_close(found[0], weights.mean(-1))
    assert target.vectors(make()).weights.shape == (1, 8, 4)
    assert Target(normal(4, 8)).vectors(make(distance="cosine")).weights is None


def test_columns_of_a_target():
    target = Target(normal(3, 5), normal(3, 5, seed=1), normal(5, 5, seed=2), normal(3), None)
    part = target.columns(torch.tensor([4, 1]))
    assert torch.equal(part.matrix, target.matrix[:, [4, 1]])
    assert torch.equal(part.weights, target.weights[:, [4, 1]])
    assert torch.equal(part.hessian, target.hessian[[4, 1]][:, [4, 1]])
    assert torch.equal(part.rows, target.rows)
    assert part.limited is None
