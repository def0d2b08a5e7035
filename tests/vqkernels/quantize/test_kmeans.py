import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkernels.errors import TensorError
from vqkernels.quantize.kmeans import assign, kmeans, point_errors

BLOCKS = sys.modules["vqkernels.quantize.kmeans.block"]
GIVEN = sys.modules["vqkernels.quantize.kmeans.given"]
SEEDING = sys.modules["vqkernels.quantize.kmeans.seeding"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def errors_to_all(points, centroids, weights=None):
    """Every weighted squared error `[count, entries]`, in float64, from the definition."""
    squares = (points[:, None].double() - centroids[None].double()).square()
    if weights is None:
        return squares.sum(-1)
    each = weights.double().reshape(len(points), 1, -1)
    return (squares * each).sum(-1)


def test_no_worse_than_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    points = normal(6000, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks at the thread pools, and warns of some
        theirs = cluster.KMeans(64, n_init=1, max_iter=25, random_state=0).fit(points.numpy())
    assert kmeans(points, 64).distortion <= 1.01 * theirs.inertia_


def test_no_worse_than_scikit_learn_with_weights():
    cluster = pytest.importorskip("sklearn.cluster")
    points = normal(6000, 8)
    weights = normal(6000, seed=1).mul(1.5).exp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cluster.KMeans(64, n_init=1, max_iter=25, random_state=0)
        theirs = model.fit(points.numpy(), sample_weight=weights.numpy())
    ours = kmeans(points, 64, weights=weights)
    # unweighted k-means loses 8 % here, so the margin tells the two apart
    assert ours.distortion <= 1.01 * theirs.inertia_


@pytest.mark.parametrize("length", [4, 8, 32])
def test_assigns_as_faiss_does(faiss, length):
    points, centroids = normal(5000, length), normal(256, length, seed=1)
    index = faiss.IndexFlatL2(length)
    index.add(centroids.numpy())
    errors, theirs = index.search(points.numpy(), 2)
    clear = errors[:, 1] - errors[:, 0] > 1e-4  # ties may go either way
    assert clear.mean() > 0.99
    assert np.array_equal(assign(points, centroids).numpy()[clear], theirs[clear, 0])


def test_assignment_is_the_nearest_in_float64():
    points, centroids = normal(700, 5), normal(37, 5, seed=1)
    assert torch.equal(assign(points, centroids), errors_to_all(points, centroids).argmin(1))


def test_assignment_over_several_tiles_of_entries():
    points, centroids = normal(300, 8), normal(2 * BLOCKS.TILE_ENTRIES + 77, 8, seed=1)
    codes = assign(points, centroids)
    assert torch.equal(codes, errors_to_all(points, centroids).argmin(1))
    assert {int(code) // BLOCKS.TILE_ENTRIES for code in codes} == {0, 1, 2}


def test_equal_centroids_give_the_lowest_code():
    centroids = normal(1, 4).expand(2 * BLOCKS.TILE_ENTRIES, 4)
    assert assign(normal(50, 4, seed=1), centroids).max() == 0


def test_assignment_weighs_each_coordinate():
    points, centroids, weights = normal(700, 5), normal(37, 5, seed=1), normal(700, 5, seed=2).exp()
    expected = errors_to_all(points, centroids, weights).argmin(1)
    assert torch.equal(assign(points, centroids, weights=weights), expected)
    assert not torch.equal(assign(points, centroids), expected)


@pytest.mark.parametrize("shift", [100.0, -3000.0])
def test_far_from_zero_costs_no_accuracy(shift):
    # quarters, so the shifted points are exact in float32
    points = (normal(2000, 4) * 64).round() / 256
    near, far = kmeans(points, 16), kmeans(points + shift, 16)
    assert torch.equal(near.codes, far.codes)
    assert far.distortion == pytest.approx(near.distortion, rel=1e-3)


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_powers_of_two_change_nothing(factor):
    points = normal(2000, 4)
    plain, scaled = kmeans(points, 16), kmeans(points * factor, 16)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.centroids * factor, scaled.centroids)


@pytest.mark.parametrize("factor", [2.0**-124, 2.0**124])
@pytest.mark.parametrize("shape", [(2000,), (2000, 4)])
def test_only_ratios_of_weights_count(factor, shape):
    points, weights = normal(2000, 4), 1 + normal(*shape, seed=1).sigmoid()
    plain = kmeans(points, 16, weights=weights)
    assert torch.equal(plain.centroids, kmeans(points, 16, weights=weights * factor).centroids)


def test_distortion_is_the_weighted_sum_of_squared_errors():
    points = normal(900, 6)
    for weights in (None, normal(900, seed=1).exp(), normal(900, 6, seed=2).exp()):
        found = kmeans(points, 32, weights=weights)
        errors = errors_to_all(points, found.centroids, weights)
        assert torch.equal(found.codes, errors.argmin(1))
        assert found.distortion == pytest.approx(float(errors.min(1).values.sum()), rel=1e-5)


def test_integer_weights_are_repeated_points():
    points = normal(600, 3)
    times = torch.randint(0, 5, (600,), generator=torch.Generator().manual_seed(1))
    repeated = points.repeat_interleave(times, dim=0)
    weighted = kmeans(points, 20, weights=times.float())
    apart = kmeans(repeated, 20)
    assert torch.equal(weighted.codes.repeat_interleave(times), apart.codes)
    torch.testing.assert_close(weighted.centroids, apart.centroids, rtol=1e-5, atol=1e-6)
    assert weighted.distortion == pytest.approx(apart.distortion, rel=1e-5)


def test_one_weight_a_point_is_the_same_weight_for_each_coordinate():
    points, weights = normal(2000, 4), normal(2000, seed=1).exp()
    once = kmeans(points, 16, weights=weights)
    each = kmeans(points, 16, weights=weights[:, None].expand(-1, 4))
    assert once.distortion == pytest.approx(each.distortion, rel=0.03)
    assert torch.equal(
        assign(points, once.centroids),
        assign(points, once.centroids, weights=weights[:, None].expand(-1, 4)),
    )


def test_coordinates_without_weight_are_not_seen():
    points = normal(1000, 4)
    weights = torch.ones(1000, 4)
    weights[:, 3] = 0
    noisy = points.clone()
    noisy[:, 3] = 1000 * normal(1000, seed=5)
    # the shared scale follows the largest coordinate, so results agree in accuracy, not in bits
    plain = kmeans(points[:, :3], 16).distortion
    assert kmeans(noisy, 16, weights=weights).distortion == pytest.approx(plain, rel=0.03)


def test_points_without_weight_are_not_seen():
    points = torch.cat([normal(500, 4), 50 + normal(500, 4, seed=1)])
    weights = torch.cat([torch.ones(500), torch.zeros(500)])
    found = kmeans(points, 16, weights=weights)
    assert found.centroids.abs().max() < 5
    assert found.distortion == pytest.approx(kmeans(points[:500], 16).distortion, rel=0.05)


def test_fewer_distinct_points_than_entries_are_all_met():
    distinct = normal(5, 4)
    points = distinct.repeat(40, 1)
    found = kmeans(points, 16)
    assert torch.isfinite(found.centroids).all()
    assert found.distortion < 1e-10
    torch.testing.assert_close(found.centroids[found.codes], points)


def test_unused_codes_are_put_to_use(monkeypatch):
    # all first centroids on one point: only re-seeding can part them
    monkeypatch.setattr(
        SEEDING,
        "plus_plus",
        lambda block, entries, draws: block.points[:, :1].repeat(1, entries, 1),
    )
    points = torch.cat([normal(100, 2) / 100 + 10 * torch.tensor([i, j])
                        for i in range(4) for j in range(4)])  # fmt: skip
    found = kmeans(points, 16)
    assert len(found.codes.unique()) == 16
    # Lloyd may leave two clusters in one code, for 5,000 each; no re-seeding leaves 400,000
    assert found.distortion < 0.1 * kmeans(points, 1).distortion


def test_unused_codes_go_to_the_sets_that_have_them(monkeypatch):
    monkeypatch.setattr(
        SEEDING,
        "plus_plus",
        lambda block, entries, draws: block.points[:, :1].repeat(1, entries, 1),
    )
    corners = torch.tensor([[0.0, 0], [0, 9], [9, 0], [9, 9]])
    points = torch.stack([corners.repeat(25, 1), corners.repeat(25, 1) * 2 + 40])
    found = kmeans(points, 4)
    assert found.distortion < 1e-6
    assert [len(codes.unique()) for codes in found.codes] == [4, 4]


def test_an_unused_code_goes_to_the_farthest_point(monkeypatch):
    monkeypatch.setattr(
        SEEDING,
        "plus_plus",
        lambda block, entries, draws: block.points[:, :1].repeat(1, entries, 1),
    )
    points = torch.tensor([[0.0], [1.0], [2.0], [30.0], [3.0]])
    # one iteration: all on code 0, then the unused code 1 moves
    assert kmeans(points, 2, iterations=1).centroids[1].item() == pytest.approx(30)


def test_all_points_equal_or_without_weight():
    points = torch.full((40, 3), 2.5)
    assert kmeans(points, 4).distortion == 0
    found = kmeans(normal(40, 3), 4, weights=torch.zeros(40))
    assert torch.isfinite(found.centroids).all()
    assert found.distortion == 0


def test_as_many_entries_as_points():
    points = normal(64, 4)
    found = kmeans(points, 64)
    assert sorted(found.codes.tolist()) == list(range(64))
    torch.testing.assert_close(found.centroids[found.codes], points)


def test_several_draws_a_round(monkeypatch):
    points = normal(4000, 4)
    exact = kmeans(points, 256).distortion
    monkeypatch.setattr(SEEDING, "ROUNDS", 16)
    found = kmeans(points, 256)
    assert len(found.codes.unique()) == 256
    assert found.distortion <= 1.03 * exact


def test_kmeans_plus_plus_beats_random_points():
    # 64 tight clusters of very different sizes: drawing points by weight alone misses the small
    sizes = [400 if i < 4 else 8 for i in range(64)]
    points = torch.cat([
        100 * normal(1, 4, seed=i) + normal(size, 4, seed=100 + i) / 100
        for i, size in enumerate(sizes)
    ])  # fmt: skip
    found = kmeans(points, 64, iterations=0)
    assert len({tuple(c.div(1).round().tolist()) for c in found.centroids}) >= 60


def test_more_iterations_help():
    points = normal(3000, 4)
    runs = [kmeans(points, 64, iterations=i).distortion for i in (0, 1, 5, 25)]
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] < 0.9 * runs[0]


def test_the_seed_decides():
    points = normal(3000, 4)
    first, again, other = kmeans(points, 32), kmeans(points, 32), kmeans(points, 32, seed=1)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.codes, again.codes)
    assert first.distortion == again.distortion
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("weights", [None, (70000,), (70000, 5)])
def test_the_number_of_threads_changes_no_bit(threads, weights):
    points = normal(70000, 5)
    each = None if weights is None else normal(*weights, seed=1).exp()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kmeans(points, 48, weights=each, iterations=6))
        assert torch.get_num_threads() == count
    for other in results[1:]:
        assert torch.equal(results[0].centroids, other.centroids)
        assert torch.equal(results[0].codes, other.codes)
        assert results[0].distortion == other.distortion


@pytest.mark.parametrize("block", [1, 1 << 16])
def test_many_sets_at_once(monkeypatch, block):
    monkeypatch.setattr(GIVEN, "BLOCK", block)
    points = normal(9, 300, 4) * torch.logspace(-6, 6, 9)[:, None, None]
    found = kmeans(points, 16)
    assert found.centroids.shape == (9, 16, 4)
    assert found.codes.shape == (9, 300)
    # the first set draws the same numbers alone
    assert torch.equal(found.codes[0], kmeans(points[0], 16).codes)
    alone = [kmeans(points[i], 16).distortion for i in range(9)]
    each = point_errors(points, found.centroids, found.codes).sum(1)
    assert each.tolist() == pytest.approx(alone, rel=0.1)
    assert found.distortion == pytest.approx(float(each.sum()))
    for i in range(9):
        errors = errors_to_all(points[i] / points[i].abs().max(), found.centroids[i]
                               / points[i].abs().max())  # fmt: skip
        assert torch.equal(found.codes[i], errors.argmin(1))


@given(
    count=st.integers(1, 80),
    length=st.integers(1, 9),
    entries=st.integers(1, 30),
    weighted=st.sampled_from([None, "point", "coordinate"]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_shape(count, length, entries, weighted, seed):
    points = normal(count, length, seed=seed)
    shapes = {None: None, "point": (count,), "coordinate": (count, length)}
    shape = shapes[weighted]
    weights = None if shape is None else normal(*shape, seed=seed + 1).clamp(min=0)
    found = kmeans(points, entries, weights=weights, iterations=5)
    assert torch.isfinite(found.centroids).all()
    errors = errors_to_all(points, found.centroids, weights)
    chosen = errors.gather(1, found.codes[:, None])[:, 0]
    assert (chosen - errors.min(1).values).max() < 1e-5 * max(1.0, float(errors.max()))
    one = kmeans(points, 1, weights=weights)
    assert found.distortion <= one.distortion * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize(
    ("points", "entries", "weights", "message"),
    [
        (torch.zeros(5), 2, None, r"points \[5\]"),
        (torch.zeros(0, 4), 2, None, r"points \[0, 4\]"),
        (torch.full((5, 2), torch.nan), 2, None, "NaN"),
        (torch.full((5, 2), torch.inf), 2, None, "infinity"),
        (torch.zeros(5, 2), 0, None, "0 entries"),
        (torch.zeros(5, 2), 2, torch.ones(4), r"weights \[4\]"),
        (torch.zeros(5, 2), 2, -torch.ones(5), "below 0"),
        (torch.zeros(5, 2), 2, torch.full((5,), torch.nan), "finite"),
    ],
)
def test_bad_input_is_one_line(points, entries, weights, message):
    with pytest.raises(TensorError, match=message) as caught:
        kmeans(points, entries, weights=weights)
    assert "\n" not in str(caught.value)


def test_centroids_of_another_length_are_refused():
    with pytest.raises(TensorError, match="don't fit points"):
        assign(torch.zeros(5, 2), torch.zeros(3, 4))
    with pytest.raises(TensorError, match="don't fit points"):
        assign(torch.zeros(2, 5, 2), torch.zeros(3, 2))
