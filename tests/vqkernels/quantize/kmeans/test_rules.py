"""Medians, medoids and means against exhaustive search and closed forms."""

import itertools

import numpy as np
import pytest
import torch

from vqkernels.errors import UnsupportedError
from vqkernels.quantize import Recipe
from vqkernels.quantize.kmeans import cluster
from vqkernels.quantize.kmeans.medians import weighted_medians


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def partitions(count, parts):
    """Every way to put `count` points in `parts` groups, none of them empty."""
    for labels in itertools.product(range(parts), repeat=count - 1):
        codes = (0, *labels)
        if len(set(codes)) == parts:
            yield np.array(codes)


def middle_median(values, weights):
    """The lowest value with half of the weight at or below it, from the definition."""
    for value in sorted(values):
        if weights[values <= value].sum() >= weights.sum() / 2:
            return value
    raise AssertionError("no weight")


def best_error(points, weights, clustering):
    """The least error of 3 entries, over every partition of `points`, in float64."""
    x, w = points.double().numpy(), weights.double().numpy()
    best = np.inf
    for codes in partitions(len(x), 3):
        total = 0.0
        for part in range(3):
            some, mass = x[codes == part], w[codes == part]
            if clustering == "lloyd":
                entry = (some * mass).sum(0) / mass.sum(0)
                total += (mass * (some - entry) ** 2).sum()
            elif clustering == "medians":
                entry = [middle_median(some[:, j], mass[:, j]) for j in range(x.shape[1])]
                total += (mass * np.abs(some - entry)).sum()
            else:
                total += min((mass * (some - entry) ** 2).sum() for entry in some)
        best = min(best, total)
    return best


def error_of(points, found, weights, clustering):
    offsets = points.double()[:, None] - found.centroids.double()[None]
    each = offsets.abs() if clustering == "medians" else offsets.square()
    return float((each * weights.double()[:, None]).sum(-1).min(1).values.sum())


@pytest.mark.parametrize("weighted", [False, "point", "coordinate"])
@pytest.mark.parametrize("clustering", ["lloyd", "medians", "medoids"])
def test_the_best_of_a_few_seeds_is_the_best_there_is(clustering, weighted):
    points = normal(8, 2, seed=3)
    shape = {False: None, "point": (8, 1), "coordinate": (8, 2)}[weighted]
    weights = torch.ones(8, 2) if shape is None else normal(*shape, seed=4).exp().expand(8, 2)
    given = {False: None, "point": weights[:, 0], "coordinate": weights}[weighted]
    recipe = Recipe(clustering=clustering)
    errors = [
        error_of(points, cluster(points, 3, weights=given, recipe=recipe, seed=seed), weights,
                 clustering)
        for seed in range(12)
    ]  # fmt: skip
    assert min(errors) == pytest.approx(best_error(points, weights, clustering), rel=1e-5)


def test_a_lone_median_is_that_of_numpy():
    points = normal(301, 4).exp()
    found = cluster(points, 1, recipe=Recipe(clustering="medians"))
    np.testing.assert_allclose(found.centroids[0], np.median(points.numpy(), axis=0), rtol=1e-6)


def test_weighted_medians_are_those_of_the_definition():
    draws = np.random.default_rng(0)
    groups = draws.integers(0, 20, 500)
    values = np.sort(draws.standard_normal(500).round(1)).astype(np.float32)
    mass = draws.integers(0, 4, 500).astype(np.float64)
    mass[groups == 5] = 0
    found, some = weighted_medians(values, mass, groups, 22)
    assert some.tolist() == [group not in (5, 20, 21) for group in range(22)]
    for group in np.flatnonzero(some):
        mine = groups == group
        assert found[group] == middle_median(values[mine], mass[mine])


def test_integer_weights_are_repeated_points_for_medians():
    points = normal(400, 3)
    times = torch.randint(1, 4, (400,), generator=torch.Generator().manual_seed(1))
    recipe = Recipe(clustering="medians", iterations=3)
    weighted = cluster(points, 10, weights=times.float(), recipe=recipe)
    apart = cluster(points.repeat_interleave(times, dim=0), 10, recipe=recipe)
    torch.testing.assert_close(weighted.centroids, apart.centroids, rtol=1e-5, atol=1e-6)


def test_medians_have_the_lower_absolute_error_and_means_the_lower_squared():
    points = normal(4000, 4) * normal(4000, 4, seed=1).exp()
    found = {name: cluster(points, 32, recipe=Recipe(clustering=name))
             for name in ("lloyd", "medians")}  # fmt: skip
    ones = torch.ones(4000, 4)
    absolute, squared = (
        {name: error_of(points, each, ones, kind) for name, each in found.items()}
        for kind in ("medians", "lloyd")
    )
    assert absolute["medians"] < 0.97 * absolute["lloyd"]
    assert squared["lloyd"] < 0.95 * squared["medians"]


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("weights", [None, (2, 3000), (2, 3000, 4)])
def test_medoids_are_vectors_of_the_data(weights, shift):
    points = normal(2, 3000, 4) + shift
    each = None if weights is None else normal(*weights, seed=1).exp()
    found = cluster(points, 32, weights=each, recipe=Recipe(clustering="medoids"))
    for entries, some in zip(found.centroids, points, strict=True):
        assert (entries[:, None] == some[None]).all(-1).any(1).all()
    means = cluster(points, 32, weights=each)
    assert means.distortion < found.distortion < 1.15 * means.distortion


def test_medoids_of_fewer_distinct_vectors_than_entries():
    points = normal(5, 4).repeat(40, 1)
    found = cluster(points, 16, recipe=Recipe(clustering="medoids"))
    assert found.distortion == 0
    assert (found.centroids[:, None] == points[None]).all(-1).any(1).all()


def test_vectors_without_weight_are_no_medoids():
    points = torch.cat([normal(300, 4), 50 + normal(300, 4, seed=1)])
    weights = torch.cat([torch.ones(300), torch.zeros(300)])
    found = cluster(points, 16, weights=weights, recipe=Recipe(clustering="medoids"))
    assert found.centroids.abs().max() < 5


def test_medoids_under_a_norm_limit_are_refused():
    with pytest.raises(UnsupportedError, match="norm_limit would move"):
        cluster(normal(9, 2), 2, recipe=Recipe(clustering="medoids", norm_limit=1.0))


def test_a_lone_medoid_is_the_vector_of_least_weighted_error():
    points, weights = (
        normal(60, 3),
        normal(60, 3, seed=1).mul(2).exp() * torch.tensor([1, 99, 0.01]),
    )
    found = cluster(points, 1, weights=weights, recipe=Recipe(clustering="medoids"))
    squares = (points[:, None] - points[None]).double().square()
    best = (squares * weights[:, None]).sum((0, 2)).argmin()
    assert torch.equal(found.centroids[0], points[best])
