"""Of many entries, only those around a guess are compared: the codes are the same."""

import numpy as np
import pytest
import torch

from vqkernels.quantize.kmeans import assign, block, kmeans, seeding
from vqkernels.quantize.kmeans.near import nearest_of_many
from vqkernels.threads import workers


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def many(monkeypatch):
    """Everything counts as many."""
    monkeypatch.setattr(block, "MANY_ENTRIES", 64)
    monkeypatch.setattr(block, "MANY_POINTS", 1)
    monkeypatch.setattr(block, "TILE_ENTRIES", 16)


def differing(points, entries, codes):
    """How much farther the coded entry is than the nearest, over the nearest's distance."""
    errors = torch.cdist(points.double(), entries.double())
    chosen = errors.gather(1, torch.as_tensor(codes)[:, None])[:, 0]
    least = errors.min(1).values
    return float(((chosen - least) / least.clamp(min=1e-3)).max())


@pytest.mark.parametrize("guess", ["best", "random", "one"])
def test_any_guess_leads_to_the_nearest(guess):
    points, entries = normal(3000, 5) / 4, normal(400, 5, seed=1) / 4
    best = torch.cdist(points.double(), entries.double()).argmin(1).numpy()
    guesses = {
        "best": best,
        "random": np.random.default_rng(0).integers(0, 400, 3000),
        "one": np.full(3000, 7),
    }
    with workers() as pool:
        codes = nearest_of_many(points.numpy(), entries.numpy(), guesses[guess], pool)
    assert differing(points, entries, codes) < 1e-5
    assert (codes == best).mean() > 0.999


def test_the_lowest_of_equal_entries():
    points, entries = normal(500, 4) / 4, normal(100, 4, seed=1) / 4
    entries = torch.cat([entries, entries])
    with workers() as pool:
        codes = nearest_of_many(points.numpy(), entries.numpy(), np.full(500, 150), pool)
    assert codes.max() < 100


@pytest.mark.parametrize("data", ["normal", "clusters", "outliers", "far", "same"])
def test_hard_data(many, data):
    points, seeded = normal(2, 2500, 4), torch.Generator().manual_seed(2)
    if data == "clusters":
        points = points / 1000 + torch.randint(-3, 4, points.shape, generator=seeded).float()
    elif data == "outliers":
        points[:, ::50] *= 1e4
    elif data == "far":
        points = points + 1000
    elif data == "same":
        points = points[:, :1].expand(2, 2500, 4)
    entries = points[:, :200] + normal(2, 200, 4, seed=1) / 50
    codes = assign(points, entries)
    # far from 0 in float32, differences are all that is accurate
    shift = points.mean(1, keepdim=True)
    for one in range(2):
        limit = 1e-2 if data in ("outliers", "far") else 1e-3
        assert differing(points[one] - shift[one], entries[one] - shift[one], codes[one]) < limit


def test_kmeans_of_many_entries(many, monkeypatch):
    points, weights = normal(4000, 4), normal(4000, seed=1).exp()
    found = kmeans(points, 200, weights=weights, iterations=8)
    assert len(found.codes.unique()) == 200
    monkeypatch.undo()
    assert found.distortion < 1.02 * kmeans(points, 200, weights=weights, iterations=8).distortion


@pytest.mark.parametrize("weights", [None, (9000, 4)])
def test_the_number_of_threads_changes_no_bit(many, monkeypatch, threads, weights):
    monkeypatch.setattr(seeding, "MANY_ENTRIES", 64)
    points = normal(9000, 4)
    each = None if weights is None else normal(*weights, seed=1).exp()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(kmeans(points, 300, weights=each, iterations=3))
    assert torch.equal(found[0].centroids, found[1].centroids)
    assert torch.equal(found[0].codes, found[1].codes)


def test_first_entries_of_many_come_from_a_part_of_the_points(monkeypatch):
    points = normal(20000, 4)
    plain = kmeans(points, 256, iterations=4)
    monkeypatch.setattr(seeding, "MANY_ENTRIES", 64)
    found = kmeans(points, 256, iterations=4)
    assert not torch.equal(found.centroids, plain.centroids)
    assert found.distortion == pytest.approx(plain.distortion, rel=0.02)
    assert len(found.codes.unique()) == 256
