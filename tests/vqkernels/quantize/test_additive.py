import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tests.vqkernels.quantize.hessians import correlated, normal, output_error
from vqkernels.errors import UnsupportedError
from vqkernels.formats import open_source
from vqkernels.formats.aqlm import dequantize, export
from vqkernels.quantize import Recipe, conjugate, quantize
from vqkernels.quantize.descent import descend
from vqkernels.quantize.grid import grid_of
from vqkernels.quantize.sums import Sums
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

SHAPES = [
    {"vector_width": 3, "vector_length": 3, "stride": 2},
    {"vector_width": 3, "group_axis": "row", "group_size": 15},
    {"stride": 4, "subspaces": 2, "group_axis": "column", "group_size": 16},
    {"vector_axis": "out", "stride": 2, "subspaces": 2},
    {"vector_axis": "out", "group_axis": "column", "group_size": 11},
    {"vector_axis": "out", "group_axis": "row", "group_size": 16},
]


def make(**fields):
    base = {"stages": (8, 4), "vector_length": 4, "codebook_dtype": "float32", "method": "additive"}
    return CodebookSpec(**base | fields)


def books_of(spec, grid, seed=1):
    """Entries of each stage, and codes, at random."""
    books = int(grid.first.max() + grid.step.max()) + 1
    entries = [
        normal(books, count, spec.vector_size, seed=seed + stage) / 2**stage
        for stage, count in enumerate(spec.stages)
    ]
    generator = torch.Generator().manual_seed(seed)
    codes = [
        torch.randint(count, (grid.rows, grid.columns), generator=generator)
        for count in spec.stages
    ]
    return entries, torch.stack(codes, dim=-1)


def loss_of(grid, entries, codes):
    return grid.loss(grid.matrix - grid.decode(entries, codes))


# ------------------------------------------------------------------------------------------------
# codes


def tiny(fields, n, k):
    spec = make(**{"stages": (3, 2), "vector_length": 2} | fields)
    mass = normal(n, seed=4).exp()
    grid = grid_of(Target(normal(n, k), None, correlated(k, seed=7), mass), spec)
    return grid, *books_of(spec, grid)


def settled(grid, entries, codes, beam=1):
    """Codes after as many sweeps as change anything, each of which may only gain."""
    losses = [loss_of(grid, entries, codes)]
    while True:
        found = descend(grid, entries, codes, beam=beam)
        if torch.equal(found, codes):
            return codes
        losses.append(loss_of(grid, entries, found))
        assert losses[-1] < losses[-2]
        codes = found


@pytest.mark.parametrize("fields", [{}, {"vector_width": 2}, {"vector_axis": "out"}])
def test_descent_ends_where_no_single_change_helps(fields):
    grid, entries, codes = tiny(fields, 8, 7)
    codes = settled(grid, entries, codes)
    best = loss_of(grid, entries, codes)
    places = itertools.product(range(grid.rows), range(grid.columns), range(2))
    for row, column, stage in places:
        for code in range(entries[stage].shape[1]):
            other = codes.clone()
            other[row, column, stage] = code
            assert loss_of(grid, entries, other) >= best * (1 - 1e-12)


def test_descent_is_often_the_best_of_all_codings():
    grid, entries, codes = tiny({"stages": (2, 2)}, 24, 6)
    choices = [list(itertools.product(range(2), range(2)))] * grid.columns
    every = torch.tensor(list(itertools.product(*choices)))
    losses = []
    for cells in every:  # rows don't touch each other: all try the same codes at once
        error = grid.matrix - grid.decode(entries, cells.expand(grid.rows, -1, -1))
        losses.append(((error @ grid.hessian) * error).sum(1) * grid.mass[:, 0])
    best = torch.stack(losses).min(0).values
    found = settled(grid, entries, codes)
    error = grid.matrix - grid.decode(entries, found)
    ours = ((error @ grid.hessian) * error).sum(1) * grid.mass[:, 0]
    assert (ours >= best * (1 - 1e-9)).all()
    assert (ours <= best * (1 + 1e-9)).float().mean() >= 0.5
    assert ours.sum() <= 1.1 * best.sum()


@pytest.mark.parametrize("weights", [None, (2, 50), (2, 50, 3)])
def test_improving_keeps_what_is_better(weights):
    points, books = normal(2, 50, 3).double(), [normal(2, 4, 3, seed=1), normal(2, 3, 3, seed=2)]
    sums = Sums(points, books, None if weights is None else normal(*weights, seed=3).exp())
    pairs = list(itertools.product(range(4), range(3)))
    every = [sums.errors(torch.tensor(pair).expand(2, 50, 2)) for pair in pairs]
    best, which = torch.stack(every).min(0)
    exact = torch.tensor(pairs)[which]
    poor = torch.zeros_like(exact)
    for known, found in ((exact, poor), (poor, exact)):
        assert torch.equal(sums.errors(sums.improve(known, found)), best)
    # each stage alone is best after one round
    some = sums.improve(poor, poor)
    assert (sums.errors(some) <= sums.errors(poor)).all()
    single = [sums.errors(torch.stack([some[..., 0], torch.full((2, 50), code)], -1))
              for code in range(3)]  # fmt: skip
    torch.testing.assert_close(sums.errors(some), torch.stack(single).min(0).values)
    # a beam as wide as the first stage is exhaustive
    torch.testing.assert_close(sums.errors(sums.encode(4)), best)


@pytest.mark.parametrize("fields", SHAPES)
def test_a_sweep_never_loses(fields):
    spec = make(**fields)
    target = Target(normal(50, 25), None, correlated(25), normal(50, seed=4).exp())
    grid = grid_of(target, spec)
    entries, codes = books_of(spec, grid)
    losses = [loss_of(grid, entries, codes)]
    for _ in range(2):
        codes = descend(grid, entries, codes, beam=2)
        losses.append(loss_of(grid, entries, codes))
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.6 * losses[0]


def test_inputs_never_seen_change_nothing():
    hessian = correlated(16)
    hessian[8:], hessian[:, 8:] = 0, 0
    grid = grid_of(Target(normal(20, 16), None, hessian), make())
    entries, codes = books_of(make(), grid)
    found = descend(grid, entries, codes, beam=1)
    assert torch.equal(found[:, 2:], codes[:, 2:])  # heavy columns are first
    assert loss_of(grid, entries, found) < loss_of(grid, entries, codes)


# ------------------------------------------------------------------------------------------------
# codebooks


@pytest.mark.parametrize("fields", SHAPES)
def test_gathering_is_the_transpose_of_decoding(fields):
    spec = make(**fields)
    grid = grid_of(Target(normal(50, 46), None, correlated(46)), spec)
    entries, codes = books_of(spec, grid)
    other = normal(*grid.matrix.shape, seed=8).double()
    forth = (grid.decode(entries, codes) * other).sum()
    sums = grid.gather(other, codes, spec.stages)
    back = sum((book * sums[stage]).sum() for stage, book in enumerate(entries))
    assert float(forth) == pytest.approx(float(back), rel=1e-9)


def test_codebooks_are_the_least_squares_solution():
    n, k, length = 12, 8, 2
    inputs, mass = normal(40, k, seed=2).double() @ normal(k, k, seed=3).double(), normal(n).exp()
    weight, spec = normal(n, k, seed=6), make(vector_length=length, stages=(3, 2))
    grid = grid_of(Target(weight, None, (inputs.T @ inputs).float(), mass), spec)
    entries, codes = books_of(spec, grid)
    solved = conjugate.solve(grid, entries, codes, steps=12, tolerance=0.0)

    # a row of the design for each row's output on each token, a column for each number in a book
    design, natural = np.zeros((n, 40, 5 * length)), codes[:, grid.order.argsort()]
    for row, cell, place in itertools.product(range(n), range(k // length), range(length)):
        seen = inputs[:, cell * length + place].numpy() * float(mass[row]) ** 0.5
        for stage, before in ((0, 0), (1, 3)):
            entry = before + int(natural[row, cell, stage])
            design[row, :, entry * length + place] += seen
    outputs = (weight.double() @ inputs.T * mass.double().sqrt()[:, None]).numpy()
    flat = design.reshape(-1, 5 * length)
    expected = np.linalg.lstsq(flat, outputs.ravel())[0]
    found = torch.cat([book[0] for book in solved]).numpy().ravel()
    # the stages share a constant, so the sums are unique, and not the entries
    np.testing.assert_allclose(flat @ found, flat @ expected, rtol=1e-4, atol=1e-4)
    before = torch.cat([book[0] for book in entries]).double().numpy().ravel()
    assert np.abs(flat @ before - flat @ expected).max() > 1


def test_entries_that_nothing_uses_stay():
    grid = grid_of(Target(normal(20, 16), None, correlated(16)), make())
    entries, codes = books_of(make(), grid)
    codes[..., 0].clamp_(max=5)
    solved = conjugate.solve(grid, entries, codes)
    assert torch.equal(solved[0][:, 6:], entries[0][:, 6:].double())
    assert not torch.isclose(solved[0][:, :6], entries[0][:, :6].double()).any()


# ------------------------------------------------------------------------------------------------
# the whole method


@pytest.mark.parametrize(
    "fields",
    [{}, {"codebook_dtype": "int8"}, {"vector_width": 2, "vector_length": 2, "scale_axis": "row"},
     {"vector_axis": "out", "group_axis": "column", "group_size": 11, "scale_axis": "column"}],
)  # fmt: skip
def test_more_rounds_lose_less(fields):
    weight, hessian = normal(50, 30), correlated(30, seed=3)
    errors = []
    for rounds in (0, 1, 2):
        recipe = Recipe(refits=rounds, iterations=5, beam=2, propagate=False)
        tensor = quantize(weight, make(**fields), hessian=hessian, recipe=recipe)
        tensor.validate()
        errors.append(output_error(weight, tensor.decode(), hessian))
    assert errors[2] <= errors[1] < 0.8 * errors[0]


def test_without_a_hessian_it_loses_no_more_than_a_residual_quantization():
    weight, weights = normal(60, 40), normal(60, 40, seed=2).exp()
    for each in (None, weights, weights[:, :1]):
        mass = 1 if each is None else each
        errors = []
        for method in ("rq", "additive"):
            recipe = Recipe(iterations=3, beam=1, refits=1)
            found = quantize(weight, make(method=method), weights=each, recipe=recipe)
            errors.append(float((mass * (weight - found.decode()).square()).sum()))
        assert errors[1] < 0.995 * errors[0]


def test_entries_that_have_to_be_vectors_of_the_weight_stay_so():
    weight, hessian = normal(60, 40), correlated(40)
    recipe = Recipe(iterations=3, beam=2, refits=2, clustering="medoids")
    tensor = quantize(weight, make(stages=(8,)), hessian=hessian, recipe=recipe)
    vectors = {tuple(vector) for vector in weight.reshape(-1, 4).tolist()}
    book = tensor.parts["codebook_0"].reshape(-1, 4)
    assert all(tuple(entry) in vectors for entry in book.tolist())
    more = quantize(weight, make(), hessian=hessian, recipe=recipe)
    less = quantize(weight, make(), hessian=hessian, recipe=dataclasses.replace(recipe, refits=0))
    errors = [output_error(weight, found.decode(), hessian) for found in (more, less)]
    assert errors[0] < errors[1]


def test_a_cosine_distance_does_not_go_with_a_full_hessian():
    spec = make(distance="cosine", vector_axis="out")
    with pytest.raises(UnsupportedError, match="distance = 'cosine' doesn't go with") as caught:
        quantize(normal(48, 30), spec, hessian=correlated(30), recipe=Recipe(iterations=2))
    assert "\n" not in str(caught.value)
    quantize(normal(48, 30), spec, hessian=correlated(30).diagonal()).validate()


def test_propagation_is_the_better_start(minilm_weight):
    weight, hessian = minilm_weight[:128, :192], correlated(192)
    errors = {}
    for name, options in {
        "plain": {"propagate": False, "refits": 0},
        "descended": {"propagate": False, "refits": 2},
        "propagated": {"refits": 0},
        "both": {"refits": 2},
    }.items():
        recipe = Recipe(iterations=3, beam=1, **options)
        tensor = quantize(weight, make(stages=(32, 32), vector_length=8), hessian=hessian,
                          recipe=recipe)  # fmt: skip
        errors[name] = output_error(weight, tensor.decode(), hessian)
    assert errors["both"] < 0.5 * errors["plain"]
    assert errors["descended"] < 0.65 * errors["plain"]
    assert errors["both"] < min(errors["descended"], errors["propagated"])


def test_what_it_makes_is_what_the_aqlm_format_holds(tmp_path):
    spec = make(stages=(16, 16), codebook_dtype="float16", scale_axis="row")
    tensor = quantize(normal(24, 36), spec, hessian=correlated(36), recipe=Recipe(iterations=3))
    export(tmp_path / "model", {"layer": tensor})
    found = open_source(tmp_path / "model")["layer"]
    assert torch.equal(found.decode(), tensor.decode())
    assert torch.equal(dequantize(found), dequantize(tensor))


def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    monkeypatch.setattr("vqkernels.quantize.products.PIECE", 64)
    weight, hessian, parts = normal(150, 64), correlated(64), []
    for count in (1, 2):
        torch.set_num_threads(count)
        recipe = Recipe(iterations=3, refits=1)
        parts.append(quantize(weight, make(), hessian=hessian, recipe=recipe).parts)
    for name, part in parts[0].items():
        assert torch.equal(part, parts[1][name]), name
