import numpy as np
import pytest
import torch

from vqkernels.errors import UnsupportedError
from vqkernels.quantize.kmeans import assign, cluster
from vqkernels.quantize.kmeans.spherical import with_lengths


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(values):
    return torch.nn.functional.normalize(values.double(), dim=-1)


def mean_cosine(points, entries, weights=None):
    best = (unit(points) @ unit(entries).T).amax(1)
    each = torch.ones(len(points)) if weights is None else weights
    return float((best * each).sum() / each.double().sum())


def test_cosine_comes_near_that_of_faiss(faiss):
    points = normal(12000, 8) * normal(12000, 1, seed=1).exp()
    theirs = faiss.Kmeans(8, 64, niter=25, spherical=True, seed=1, max_points_per_centroid=10**6)
    theirs.train(unit(points).float().numpy())
    found = cluster(points, 64, distance="cosine")
    best = mean_cosine(points, torch.from_numpy(theirs.centroids))
    # over five seeds both reach .7784 to .7808
    assert mean_cosine(points, found.centroids) >= best - 0.003
    # nearest by squared error is another thing
    assert mean_cosine(points, cluster(points, 64).centroids) < best - 0.02


def test_weights_count():
    points, weights = normal(5000, 4), normal(5000, seed=1).mul(2).exp()
    found = cluster(points, 32, weights=weights, distance="cosine")
    plain = cluster(points, 32, distance="cosine")
    assert mean_cosine(points, found.centroids, weights) > 0.005 + mean_cosine(
        points, plain.centroids, weights
    )


def test_lengths_of_points_change_no_direction():
    points = normal(3000, 4)
    scaled = points * normal(3000, 1, seed=1).exp()
    found, other = (cluster(each, 32, distance="cosine") for each in (points, scaled))
    agree = (found.codes == other.codes).double().mean()
    assert agree > 0.99
    torch.testing.assert_close(unit(found.centroids), unit(other.centroids), atol=0.02, rtol=0)


def test_codes_are_the_largest_cosine():
    points, entries = normal(2, 900, 5), normal(2, 40, 5, seed=1) * 3
    expected = torch.einsum("scj,sej->sce", unit(points), unit(entries)).argmax(-1)
    assert torch.equal(assign(points, entries, distance="cosine"), expected)
    assert not torch.equal(assign(points, entries), expected)


def test_zeros_have_no_direction():
    entries = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, -3.0]])
    points = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [-1.0, -0.1], [0.0, 0.0]])
    assert assign(points, entries, distance="cosine").tolist() == [0, 2, 3, 1]
    mixed = torch.cat([normal(300, 4), torch.zeros(300, 4)])
    found = cluster(mixed, 16, distance="cosine")
    assert torch.isfinite(found.centroids).all()
    assert mean_cosine(mixed[:300], found.centroids) == pytest.approx(
        mean_cosine(mixed[:300], cluster(mixed[:300], 16, distance="cosine").centroids), abs=0.02
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_an_entry_has_the_length_of_least_squared_error(weighted):
    points = normal(2000, 4)
    weights = normal(2000, seed=1).exp() if weighted else None
    found = cluster(points, 20, weights=weights, distance="cosine")
    each = torch.ones(2000) if weights is None else weights

    def lost(factor):
        off = points - factor * found.centroids[found.codes]
        return float((off.double().square().sum(-1) * each).sum())

    assert lost(1.0) < min(lost(0.99), lost(1.01))
    for code in range(20):
        mine = found.codes == code
        entry, mass = found.centroids[code].double(), each[mine].double()
        along = points[mine].double() @ entry / entry.norm()
        assert float(entry.norm()) == pytest.approx(
            float((along * mass).sum() / mass.sum()), rel=1e-4
        )


def test_a_length_never_turns_an_entry_round():
    points = torch.tensor([[[3.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]]])
    found = with_lengths(
        points, None, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), np.array([[1, 0, 0]])
    )
    assert 0 < float(found[0, 0, 0]) < 0.01
    assert 0 < float(found[0, 1, 1]) < 0.01


def test_one_direction_is_the_mean_of_the_directions():
    points = normal(500, 3) + 1
    entry = cluster(points, 1, distance="cosine").centroids[0]
    torch.testing.assert_close(unit(entry), unit(unit(points).sum(0)), atol=1e-5, rtol=0)


def test_opposite_points_have_some_direction():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(20, 1)
    found = cluster(points, 1, distance="cosine")
    assert torch.isfinite(found.centroids).all()
    assert float(found.centroids.abs().max()) > 0


def test_weights_of_coordinates_are_refused():
    points = normal(50, 4)
    for call in (
        lambda: cluster(points, 4, weights=torch.rand(50, 4), distance="cosine"),
        lambda: assign(points, points[:4], weights=torch.rand(50, 4), distance="cosine"),
    ):
        with pytest.raises(UnsupportedError, match="one weight a vector") as caught:
            call()
        assert "\n" not in str(caught.value)
