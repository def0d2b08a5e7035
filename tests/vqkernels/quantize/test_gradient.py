import dataclasses
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from vqkernels.errors import SpecError
from vqkernels.quantize.gradient import VectorQuantizer
from vqkernels.quantize.kmeans import assign, kmeans, point_errors
from vqkernels.quantize.kmeans.learning import MovingAverage, learn
from vqkernels.quantize.recipe import Recipe


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(points, entries):
    return torch.cdist(points.double(), entries.double()).argmin(-1)


# --- the layer ---


def test_values_are_the_nearest_entries_and_gradients_go_straight_through():
    layer = VectorQuantizer(16, 4, seed=3).eval()
    z = normal(5, 7, 4).requires_grad_()
    found = layer(z)
    codes = nearest(z.detach().reshape(-1, 4), layer.codebook).reshape(5, 7)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.values, layer.codebook[codes])
    upstream = normal(5, 7, 4, seed=1)
    (found.values * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)


def test_losses_have_the_gradients_of_the_paper():
    # commitment * |z - sg(e)|^2 moves z alone, |sg(z) - e|^2 the entries alone; both are means
    layer = VectorQuantizer(8, 3, update="gradient", commitment=0.4, expiry=0)
    z = normal(50, 3).requires_grad_()
    found = layer(z)
    found.loss.backward()
    chosen = layer.codebook.detach()[found.codes]
    torch.testing.assert_close(z.grad, 0.4 * 2 * (z.detach() - chosen) / z.numel())
    expected = torch.zeros(8, 3)
    for row, code in enumerate(found.codes.tolist()):
        expected[code] += 2 * (chosen[row] - z.detach()[row]) / z.numel()
    torch.testing.assert_close(layer.codebook.grad, expected)
    loss = (1 + 0.4) * (z.detach() - chosen).square().mean()
    torch.testing.assert_close(found.loss.detach(), loss)


def test_moving_averages_are_those_of_the_paper():
    # N = g N + (1 - g) n;  m = g m + (1 - g) sum z;  e = m / N (appendix A.1)
    layer = VectorQuantizer(6, 2, decay=0.7, expiry=0, seed=1)
    entries = layer.codebook.numpy().astype(np.float64).copy()
    mass, sums = np.zeros(6), np.zeros((6, 2))
    for step in range(5):
        z = normal(40, 2, seed=step)
        codes = layer(z).codes.numpy()
        assert np.array_equal(codes, nearest(z, torch.from_numpy(entries)).numpy())
        for entry in range(6):
            members = z.numpy()[codes == entry]
            mass[entry] = 0.7 * mass[entry] + 0.3 * len(members)
            sums[entry] = 0.7 * sums[entry] + 0.3 * members.sum(0)
            if mass[entry]:
                entries[entry] = sums[entry] / mass[entry]
        np.testing.assert_allclose(layer.codebook.numpy(), entries, rtol=1e-5, atol=1e-6)


def test_nothing_is_learned_in_evaluation():
    layer = VectorQuantizer(16, 4).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(normal(100, 4))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_perplexity_counts_the_codes_in_use():
    layer = VectorQuantizer(4, 1).eval()
    layer.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    assert layer(torch.tensor([[0.0], [1.0], [2.0], [3.0]])).perplexity.item() == pytest.approx(4)
    assert layer(torch.zeros(8, 1)).perplexity.item() == pytest.approx(1)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_entries_expire_onto_the_batch(update):
    z = normal(64, 2)
    for expiry, dead in ((0.1, 0), (0.0, 15)):
        layer = VectorQuantizer(16, 2, update=update, expiry=expiry)
        with torch.no_grad():
            layer.codebook[1:] = 1000 + torch.arange(15.0)[:, None]
        layer(z)
        far = layer.codebook.detach()[1:]
        assert int((far.abs() > 100).any(1).sum()) == dead
        if expiry:
            assert all(bool((z == entry).all(1).any()) for entry in far)


def test_an_autoencoder_learns_its_codes():
    # three clusters: encoder, codebook and decoder are trained together
    centers = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]])
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
    layer = VectorQuantizer(3, 2, decay=0.8, expiry=0.1)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    for step in range(200):
        x = centers.repeat(20, 1) + 0.1 * normal(60, 3, seed=step)
        found = layer(encoder(x))
        loss = (decoder(found.values) - x).square().mean() + found.loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        assert (decoder(layer.eval()(encoder(centers)).values) - centers).square().mean() < 0.05
    assert found.perplexity > 2.9


@pytest.mark.parametrize(
    "options", [{"update": "sgd"}, {"decay": 1.0}, {"decay": -0.1}], ids=["update", "1", "below 0"]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="VectorQuantizer: 4 entries of 2") as caught:
        VectorQuantizer(4, 2, **options)
    assert "\n" not in str(caught.value)


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ValueError, match="z ends in 3, but entries have 2"):
        VectorQuantizer(4, 2)(torch.zeros(5, 3))


# --- codebooks of a weight ---


def error_of(points, entries, weights=None):
    codes = assign(points, entries, weights=weights)
    return float(point_errors(points, entries, codes, weights).sum())


def test_a_whole_batch_without_memory_is_a_step_of_lloyd():
    points, first = normal(500, 3), normal(10, 3, seed=1)
    average = MovingAverage(first[None], decay=0)
    average.count(points[None], assign(points[None], first[None]))
    average.follow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one step does not converge
        oracle = SklearnKMeans(10, init=first.numpy(), n_init=1, max_iter=1, tol=0).fit(points)
    # sklearn's centres of its last labels
    codes = nearest(points, first)
    means = np.stack([points.numpy()[codes == i].mean(0) for i in range(10)])
    np.testing.assert_allclose(average.entries[0], means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(average.entries[0], oracle.cluster_centers_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_what_is_learned_is_as_good_as_lloyds(clustering):
    points = normal(1, 8192, 4)
    lloyd = kmeans(points, 32, iterations=20)
    first = kmeans(points, 32, iterations=0).centroids
    recipe = Recipe(clustering=clustering, iterations=20, batch=512)
    entries = learn(points, first, recipe=recipe)
    assert error_of(points, entries) < 1.02 * lloyd.distortion
    assert error_of(points, entries) < 0.8 * error_of(points, first)


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_weights_of_coordinates_count(clustering):
    points = normal(1, 2048, 4)
    weights = torch.exp(2 * normal(1, 2048, 4, seed=1))
    first = kmeans(points, 16, iterations=0).centroids
    recipe = Recipe(clustering=clustering, iterations=20, batch=256)
    plain, weighted = (learn(points, first, weights=one, recipe=recipe) for one in (None, weights))
    assert error_of(points, weighted, weights) < 0.97 * error_of(points, plain, weights)


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_sets_are_learned_apart(clustering):
    points = torch.stack([normal(512, 2), 100 * normal(512, 2, seed=1)])
    first = kmeans(points, 8, iterations=0).centroids
    entries = learn(points, first, recipe=Recipe(clustering=clustering, iterations=5, batch=128))
    assert entries[0].abs().max() < 10 < 50 < entries[1].abs().max()


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_same_seed_same_bits_on_any_number_of_threads(clustering):
    points = normal(2, 4096, 8)
    first = kmeans(points, 64, iterations=0).centroids
    recipe = Recipe(clustering=clustering, iterations=2, batch=1024)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(learn(points, first, recipe=recipe, seed=5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert not torch.equal(found[0], learn(points, first, recipe=recipe, seed=6))


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_entries_without_vectors_are_used_in_the_end(clustering):
    points = normal(1, 4096, 2)
    first = normal(1, 32, 2, seed=1)
    first[:, 16:] += 1000
    recipe = Recipe(clustering=clustering, iterations=10, batch=512, decay=0.9, expiry=0.05)
    for expiry, used in ((0.05, 32), (0.0, 16)):
        entries = learn(points, first, recipe=dataclasses.replace(recipe, expiry=expiry))
        assert len(assign(points, entries).unique()) == used


@pytest.mark.parametrize("clustering", ["ema", "gradient"])
def test_weights_count_by_their_ratios_and_nothing_without_one_counts(clustering):
    points, weights = normal(1, 1024, 4), torch.ones(1, 1024)
    points[:, 512:] *= 1000
    weights[:, 512:] = 0
    # entries that start far off expire, onto vectors with a weight only
    first = torch.cat([points[:, :8], points[:, 512:520]], dim=1)
    recipe = Recipe(clustering=clustering, iterations=10, batch=256, expiry=0.05)
    found = [
        learn(points, first, weights=scale * weights, recipe=recipe) for scale in (1, 2.0**-40)
    ]
    assert found[0].abs().max() < 10
    torch.testing.assert_close(*found)
