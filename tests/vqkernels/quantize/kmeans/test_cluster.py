"""What every clustering has in common: seeds, threads, no dead codes, limits, merging."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import cluster as sklearn

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.quantize import Recipe
from vqkernels.quantize.kmeans import assign, cluster, kmeans, lloyd, minibatch, seeding
from vqkernels.quantize.kmeans.block import Block
from vqkernels.quantize.kmeans.merging import near_equal
from vqkernels.threads import workers

CLUSTERINGS = ("lloyd", "minibatch", "medians", "medoids", "ema", "gradient")
KINDS = [(name, "l2") for name in CLUSTERINGS] + [("lloyd", "cosine"), ("minibatch", "cosine")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(first, second):
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.codes, second.codes)
    assert first.distortion == second.distortion


# --- others' implementations ---


@pytest.mark.parametrize("weighted", [False, True])
def test_lloyd_is_that_of_scikit_learn(weighted):
    points = normal(4000, 8)
    first = points[:64]
    weights = normal(4000, seed=1).exp() if weighted else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it stops before it has converged, as it is told to
        theirs = sklearn.KMeans(64, init=first.numpy(), n_init=1, max_iter=10, tol=0).fit(
            points.numpy(), sample_weight=None if weights is None else weights.numpy()
        )
    with workers() as pool:
        block = Block.of(points[None], None if weights is None else weights[None], pool)
        rule = lloyd.mean_rule(block)
        found = block.restore(lloyd.iterate(block, rule, block.enter(first[None]), 10))
    np.testing.assert_allclose(found[0], theirs.cluster_centers_, atol=1e-4)


def test_a_step_of_a_mini_batch_is_that_of_scikit_learn():
    first, seen = normal(16, 4, seed=2), np.zeros((4, 16))
    theirs = sklearn.MiniBatchKMeans(16, init=first.numpy(), n_init=1, reassignment_ratio=0)
    entries = first[None]
    with workers() as pool:
        for turn in range(3):
            batch, weights = normal(500, 4, seed=turn), normal(500, seed=9 + turn).exp()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it looks at the thread pools, and warns of some
                theirs.partial_fit(batch.numpy(), sample_weight=weights.numpy())
            block = Block.of(batch[None], weights[None], pool)
            inside = block.enter(entries)
            # the block has weights at about 1: what was seen has to be in the same unit
            unit = float(weights[0] / block.weights[0, 0])
            moved, after = minibatch.step(block, block.nearest(inside), inside, seen / unit)
            entries, seen = block.restore(moved), after * unit
    np.testing.assert_allclose(entries[0], theirs.cluster_centers_, atol=1e-5)


def test_mini_batches_come_near_lloyd():
    points = normal(20000, 8)
    best = cluster(points, 64).distortion
    found = cluster(points, 64, recipe=Recipe(clustering="minibatch", batch=1000))
    assert best < found.distortion < 1.03 * best


# --- every clustering ---


def test_the_default_recipe_is_kmeans():
    points, weights = normal(2, 3000, 4), normal(2, 3000, seed=1).exp()
    same(cluster(points, 32, weights=weights, seed=(1, 2)),
         kmeans(points, 32, weights=weights, seed=(1, 2)))  # fmt: skip


@pytest.mark.parametrize(("clustering", "distance"), KINDS)
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_no_codes_are_dead(clustering, distance, init):
    recipe = Recipe(clustering=clustering, init=init, iterations=5, batch=1000)
    points = normal(2, 2500, 8)
    found = cluster(points, 100, recipe=recipe, distance=distance)
    assert found.centroids.shape == (2, 100, 8)
    assert [len(codes.unique()) for codes in found.codes] == [100, 100]
    # both are what assign and the definition say
    assert torch.equal(found.codes, assign(points, found.centroids, distance=distance))
    which = torch.arange(2)[:, None]
    lost = (points - found.centroids[which, found.codes]).double().square().sum()
    assert found.distortion == pytest.approx(float(lost), rel=1e-6)
    assert found.distortion < 1.2 * kmeans(points, 100).distortion


@pytest.mark.parametrize(("clustering", "distance"), KINDS)
def test_the_seed_decides_and_threads_do_not(clustering, distance, threads):
    points, weights = normal(12000, 5), normal(12000, seed=1).exp()
    merge = 0.0 if clustering in ("ema", "gradient") else 0.4
    init = "random" if clustering == "lloyd" else "kmeans++"
    recipe = Recipe(clustering=clustering, iterations=3, merge=merge, init=init)
    found = []
    for count, seed in ((1, 0), (2, 0), (2, 1)):
        torch.set_num_threads(count)
        found.append(
            cluster(points, 48, weights=weights, recipe=recipe, distance=distance, seed=seed)
        )
    same(found[0], found[1])
    assert not torch.equal(found[0].centroids, found[2].centroids)


@pytest.mark.parametrize("clustering", CLUSTERINGS)
@pytest.mark.parametrize("shape", [(3000,), (3000, 4)])
def test_weights_count(clustering, shape):
    points, weights = normal(3000, 4), normal(*shape, seed=1).mul(2).exp()
    recipe = Recipe(clustering=clustering, iterations=8, batch=500)
    weighted = cluster(points, 32, weights=weights, recipe=recipe)
    plain = cluster(points, 32, recipe=recipe)
    each = weights.reshape(3000, -1).double()

    def error(entries):
        squares = (points[:, None] - entries[None]).double().square()
        return float((squares * each[:, None]).sum(-1).min(1).values.sum())

    assert weighted.distortion == pytest.approx(error(weighted.centroids), rel=1e-5)
    assert weighted.distortion < 0.9 * error(plain.centroids)


@pytest.mark.parametrize("clustering", ["lloyd", "minibatch", "medians", "medoids", "ema"])
def test_points_without_weight_are_not_seen(clustering):
    points = torch.cat([normal(500, 4), 50 + normal(500, 4, seed=1)])
    weights = torch.cat([torch.ones(500), torch.zeros(500)])
    recipe = Recipe(clustering=clustering, init="random", expiry=0.0, batch=200)
    found = cluster(points, 16, weights=weights, recipe=recipe)
    assert found.centroids.abs().max() < 10


# --- first entries ---


def test_random_first_entries_are_distinct_vectors():
    points = normal(60, 3).repeat(50, 1)
    with workers() as pool:
        block = Block.of(points[None], None, pool)
        draws = np.random.default_rng(0)
        first = seeding.random_points(block, 50, draws)[0]
        again = seeding.random_points(block, 50, draws)[0]
        many = seeding.random_points(block, 70, draws)[0]
    assert len(first.unique(dim=0)) == 50
    assert (first[:, None] == block.points[0][None]).all(-1).any(1).all()
    assert not torch.equal(first, again)
    assert len(many.unique(dim=0)) == 60
    assert len(many) == 70


# --- norm limit ---


@pytest.mark.parametrize(("clustering", "distance"), [kind for kind in KINDS
                                                      if kind[0] != "medoids"])  # fmt: skip
def test_entries_keep_to_the_norm_limit(clustering, distance):
    points = 100 * normal(2, 3000, 4) * torch.tensor([1.0, 1e-3])[:, None, None] + 3
    rms = points.double().square().sum(-1).mean(-1).sqrt()
    recipe = Recipe(clustering=clustering, iterations=6, batch=500)
    free = cluster(points, 32, recipe=recipe, distance=distance)
    assert (free.centroids.double().norm(dim=-1).amax(-1) > 0.9 * rms).all()
    held = Recipe(clustering=clustering, iterations=6, batch=500, norm_limit=0.8)
    found = cluster(points, 32, recipe=held, distance=distance)
    norms = found.centroids.double().norm(dim=-1).amax(-1)
    assert (norms <= 0.8 * rms).all()
    assert (norms > 0.799 * rms).all()


def test_a_limited_entry_is_the_best_allowed():
    points = normal(500, 3) + 2
    found = cluster(points, 1, recipe=Recipe(norm_limit=0.5))
    rms = float(points.square().sum(-1).mean().sqrt())
    around = torch.nn.functional.normalize(normal(20000, 3, seed=5), dim=-1) * rms / 2
    errors = (points[None].mean(1) - around).square().sum(-1) - float(
        (points.mean(0) - found.centroids[0]).square().sum()
    )
    assert -1e-3 < float(errors.min()) < 1e-2


# --- merging ---


def test_near_equal_entries_are_found():
    entries = normal(300, 4)
    entries[200] = entries[10] + 1e-3
    entries[250] = entries[10] - 1e-3
    entries[299] = entries[299 - 1] + 5e-3
    gone = near_equal(torch.stack([entries, entries]), torch.tensor([4e-3, 2e-2]))
    assert np.flatnonzero(gone[0]).tolist() == [200, 250]
    assert np.flatnonzero(gone[1]).tolist() == [200, 250, 299]


def test_an_entry_near_one_that_has_gone_stays():
    entries = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert near_equal(entries[None], torch.tensor([1.5]))[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("clustering", ["lloyd", "minibatch", "medians", "medoids"])
def test_merging_parts_what_is_far_from_all_entries(clustering, monkeypatch):
    # 16 tight clusters, and first entries of which 12 crowd into one of them
    spots = 10 * torch.tensor([[i, j] for i in range(4) for j in range(4)], dtype=torch.float32)
    points = (spots[:, None] + normal(16, 100, 2) / 10).reshape(-1, 2)
    crowd = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 500, 700, 900, 1200]
    monkeypatch.setattr(seeding, "plus_plus", lambda block, entries, draws: block.points[:, crowd])
    options = {"clustering": clustering, "batch": 400, "iterations": 10}
    apart = cluster(points, 16, recipe=Recipe(**options))
    merged = cluster(points, 16, recipe=Recipe(merge=0.05, **options))
    assert merged.distortion < 0.1 * apart.distortion


# --- refused ---


@pytest.mark.parametrize("clustering", ["medians", "medoids", "ema", "gradient"])
def test_clusterings_without_a_cosine_are_refused(clustering):
    with pytest.raises(
        UnsupportedError, match=f"'{clustering}' has no distance 'cosine'"
    ) as caught:
        cluster(normal(9, 2), 2, recipe=Recipe(clustering=clustering), distance="cosine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_learned_entries_do_not_merge(clustering):
    with pytest.raises(UnsupportedError, match="merges no entries"):
        cluster(normal(9, 2), 2, recipe=Recipe(clustering=clustering, merge=0.1))


@pytest.mark.parametrize("clustering", CLUSTERINGS)
def test_no_entries_is_an_error(clustering):
    with pytest.raises(TensorError, match="0 entries"):
        cluster(normal(9, 2), 0, recipe=Recipe(clustering=clustering))
