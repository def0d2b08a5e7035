"""Samples of vectors: unbiased sums, certain outliers, strata, coverage, layers together."""

import collections
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from vqkernels.errors import TensorError
from vqkernels.quantize import Recipe, sampling
from vqkernels.quantize.layout import Vectors, block, split
from vqkernels.quantize.over_layers import over_layers
from vqkernels.quantize.sampling import CoverageWarning, coverage
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (4,), "vector_length": 4} | fields)


def drawn(vectors, spec, n, k, size, seed):
    """A sample, whatever it covers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        return sampling.sample(vectors, spec, n, k, size, seed=seed)


def cells_of(vectors):
    return vectors.cells[vectors.cells >= 0].tolist()


def same(one, other):
    assert torch.equal(one.points, other.points)
    assert torch.equal(one.cells, other.cells)
    assert (one.weights is None) == (other.weights is None)
    assert one.weights is None or torch.equal(one.weights, other.weights)


# --- sums ---


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("weighted", ["", "vector", "coordinate"])
def test_each_vector_weighs_on_average_what_it_weighed(axis, weighted):
    spec = make(vector_axis=axis, group_axis="row", group_size=8)
    matrix = normal(20, 14) * torch.linspace(0.2, 3, 20)[:, None]  # padding, and books of 3 sizes
    weights = None
    if weighted:
        weights = (
            normal(20, 14, seed=1).square() if weighted == "coordinate" else torch.ones(20, 14)
        )
        weights[:, :4] *= 5
        weights[3] = 0
    vectors = split(spec, matrix, weights)
    truth = sums_by_row(vectors, 20, 14, axis)
    found = torch.stack(
        [sums_by_row(drawn(vectors, spec, 20, 14, 9, seed), 20, 14, axis) for seed in range(120)]
    )
    mean, spread = found.mean(0), found.std(0) / math.sqrt(len(found))
    assert (abs(mean - truth) <= 4 * spread + 1e-6 * truth).all()
    # and the bound says something: twice the weight would be seen in most rows
    assert float((4 * spread < truth).double().mean()) > 0.8


def sums_by_row(vectors, n, k, axis):
    """Sum of weights and of weighted squares in each row of the code grid: `[2, rows]`."""
    rows, columns = (n, math.ceil(k / 4)) if axis == "in" else (math.ceil(n / 4), k)
    weights = torch.ones(()) if vectors.weights is None else vectors.weights
    weights = (weights[..., None] if weights.ndim < 3 else weights).expand(vectors.points.shape)
    real = vectors.cells >= 0
    row = vectors.cells[real] // columns
    both = torch.stack([weights, weights * vectors.points.square()]).double().sum(-1)[:, real]
    return torch.zeros(2, rows, dtype=torch.float64).index_add(1, row, both)


def test_weights_are_one_over_the_chance_that_a_count_confirms():
    spec = make()
    vectors = split(spec, normal(8, 40), None)
    counts, weight = collections.Counter(), {}
    for seed in range(400):
        kept = drawn(vectors, spec, 8, 40, 20, seed)
        counts.update(cells_of(kept))
        weight.update(zip(kept.cells[0].tolist(), kept.weights[0].tolist(), strict=True))
    assert sum(1 / one for one in weight.values()) == pytest.approx(20, rel=1e-5)
    for cell, chance in ((cell, 1 / one) for cell, one in weight.items()):
        assert counts[cell] / 400 == pytest.approx(chance, abs=4.5 * math.sqrt(0.25 / 400))


def test_the_sum_of_squares_is_nearer_than_a_plain_draw_gives():
    spec = make()
    matrix = normal(64, 64) * torch.linspace(0.1, 2, 64)[:, None]
    vectors = split(spec, matrix, None)
    truth = float(matrix.square().sum())
    squares = vectors.points[0].square().sum(-1).numpy()
    ours, plain = [], []
    for seed in range(40):
        kept = drawn(vectors, spec, 64, 64, 64, seed)
        ours.append(float((kept.points.square().sum(-1) * kept.weights).sum()) - truth)
        taken = np.random.default_rng(seed).choice(1024, 64, replace=False)
        plain.append(float(squares[taken].sum()) * 16 - truth)
    assert np.square(ours).mean() < 0.1 * np.square(plain).mean()


# --- outliers and strata ---


def test_rare_outliers_are_in_every_sample_with_their_own_weight():
    spec = make()
    matrix = normal(100, 200) / 2
    outliers = {37 * 50 + 2: 8.0, 61 * 50: 7.5, 90 * 50 + 49: 7.0}  # times the root mean square
    for cell, norm in outliers.items():
        matrix[cell // 50, cell % 50 * 4 :][:4] = torch.tensor([norm, 0, 0, 0])
    vectors = split(spec, matrix, None)
    for seed in range(30):
        kept = drawn(vectors, spec, 100, 200, 50, seed)
        for cell, norm in outliers.items():
            at = kept.cells[0].tolist().index(cell)
            assert float(kept.weights[0, at]) == 1
            assert kept.points[0, at].tolist() == [norm, 0, 0, 0]


def test_the_longest_vector_is_in_every_sample():
    spec = make()
    vectors = split(spec, normal(100, 200), None)
    longest = int(vectors.points[0].square().sum(-1).argmax())
    assert all(longest in cells_of(drawn(vectors, spec, 100, 200, 8, seed)) for seed in range(30))


def test_many_outliers_leave_room_for_the_rest():
    spec = make()
    matrix = normal(100, 200) / 100
    matrix[::2, :4] = 100.0  # 50 of 5000
    vectors = split(spec, matrix, None)
    kept = drawn(vectors, spec, 100, 200, 40, 0)
    common = int((kept.points.abs().amax(-1) < 1).sum())
    # half of the draws go by weight alone: about 20 of the 40 are not among the 50
    assert 10 <= common <= 25


def test_every_channel_gets_the_share_that_sklearn_gives_it():
    spec = make(stages=(2,))
    points = torch.nn.functional.normalize(normal(20, 50, 4), dim=-1)
    points[:4, 25:] *= -1
    vectors = split(spec, points.reshape(20, 200), None)
    rows = np.repeat(np.arange(20), 50)
    theirs, _ = train_test_split(rows, train_size=320, stratify=rows, random_state=0)
    assert set(np.bincount(theirs)) == {16}
    for seed in range(5):
        kept = drawn(vectors, spec, 20, 200, 320, seed)
        ours = np.bincount(kept.cells[0].numpy() // 50, minlength=20)
        assert abs(ours - 16).max() <= 1
    spec = make(stages=(2,), vector_axis="out")
    vectors = split(spec, points.permute(1, 2, 0).reshape(200, 20), None)
    kept = drawn(vectors, spec, 200, 20, 320, 0)
    assert abs(np.bincount(kept.cells[0].numpy() % 20, minlength=20) - 16).max() <= 1


def test_every_stretch_of_norms_gets_the_share_that_sklearn_gives_it():
    spec = make(stages=(2,))
    level = torch.arange(400) % 4 + 1.0  # 4 norms, 100 vectors of each
    points = torch.nn.functional.normalize(normal(400, 4), dim=-1) * level[:, None]
    vectors = split(spec, points.reshape(4, 400), None)
    _, theirs = train_test_split(level.numpy(), test_size=40, stratify=level.numpy())
    assert collections.Counter(theirs) == {1.0: 10, 2.0: 10, 3.0: 10, 4.0: 10}
    for seed in range(5):
        _, held = sampling.hold_out(vectors, spec, 4, 400, 0.1, seed=seed)
        found = collections.Counter(held.points[0].norm(dim=-1).round().tolist())
        # two bands of channels, each to within one
        assert all(8 <= found[norm] <= 12 for norm in (1.0, 2.0, 3.0, 4.0))
        assert sum(found.values()) == 40


# --- what is drawn ---


@pytest.mark.parametrize("weighted", [False, True])
def test_a_size_of_all_or_of_0_changes_nothing(weighted):
    spec = make()
    vectors = split(spec, normal(8, 16), normal(8, 16).square() if weighted else None)
    for size in (0, 32, 33):
        assert sampling.sample(vectors, spec, 8, 16, size, seed=0) is vectors
    with pytest.raises(TensorError, match="size of -1; ask for 1"):
        sampling.sample(vectors, spec, 8, 16, -1, seed=0)


def test_vectors_of_no_weight_are_never_drawn():
    spec = make()
    weights = torch.zeros(8, 64)
    weights[2:4] = 1
    vectors = split(
        spec, normal(8, 64) * torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])[:, None], weights
    )
    few = drawn(vectors, spec, 8, 64, 8, 0)
    assert few.cells.shape == (1, 8)
    assert set((few.cells // 16).flatten().tolist()) == {2, 3}
    # of the 32 that weigh something, 40 are all
    every = sampling.sample(vectors, spec, 8, 64, 40, seed=0)
    assert sorted(cells_of(every)) == list(range(32, 64))
    assert bool((every.weights[every.cells >= 0] == 1).all())


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    size=st.integers(1, 60),
    seed=st.integers(0, 1 << 32),
    axis=st.sampled_from(["in", "out"]),
    layout=st.sampled_from([{}, {"subspaces": 2}, {"group_axis": "row", "group_size": 4}]),
    weighted=st.booleans(),
)
@settings(max_examples=60)
def test_a_sample_is_some_of_the_vectors(n, k, size, seed, axis, layout, weighted):
    spec = make(vector_axis=axis, **layout)
    matrix = normal(n, k, seed=seed)
    weights = normal(n, k, seed=seed + 1).square().float() if weighted else None
    vectors = split(spec, matrix, weights)
    kept = drawn(vectors, spec, n, k, size, seed)
    cells = block(spec, matrix).reshape(-1, 4)
    for book in range(len(kept.cells)):
        mine = kept.cells[book]
        chosen = mine[mine >= 0]
        assert len(set(chosen.tolist())) == len(chosen) <= max(size, 0)
        assert set(chosen.tolist()) <= set(vectors.cells[book].tolist())
        weigh = (vectors.weights is None) or vectors.weights.reshape(*vectors.cells.shape, -1).sum(
            -1
        )
        some = vectors.cells[book] >= 0 if weigh is True else (weigh[book] > 0)
        assert len(chosen) == min(size, int(some.sum()))
        assert torch.equal(kept.points[book][mine >= 0], cells[chosen])
        assert not kept.points[book][mine < 0].any()
        if kept.weights is not None:
            assert not kept.weights[book][mine < 0].any()
            assert torch.isfinite(kept.weights[book]).all()


def test_the_same_seed_draws_the_same_on_one_and_two_threads():
    spec = make()
    vectors = split(spec, normal(64, 64), normal(64, 64).square())
    found, held, together = [], [], []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(sampling.sample(vectors, spec, 64, 64, 100, seed=(3, 1)))
        held.append(sampling.hold_out(vectors, spec, 64, 64, 0.2, seed=3)[1])
        together.append(over_layers({"a": normal(64, 64)}, spec, 100, seed=3))
    torch.set_num_threads(before)
    for pair in (found, held, together):
        same(*pair)
    other = sampling.sample(vectors, spec, 64, 64, 100, seed=(3, 2))
    assert not torch.equal(other.cells, found[0].cells)


# --- hold-out ---


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_hold_out_splits_each_book_in_two(share):
    spec = make(group_axis="row", group_size=8)
    vectors = split(spec, normal(20, 40), normal(20, 40).square())
    train, test = sampling.hold_out(vectors, spec, 20, 40, share, seed=1)
    for book, count in ((0, 80), (1, 80), (2, 40)):
        one, other = (cells_of(Vectors(p.points[book], None, p.cells[book])) for p in (train, test))
        assert not set(one) & set(other)
        assert sorted(one + other) == sorted(c for c in vectors.cells[book].tolist() if c >= 0)
        assert len(other) == round(share * count)
        at = {int(cell): number for number, cell in enumerate(vectors.cells[book])}
        for part, cells in ((train, one), (test, other)):
            real = part.cells[book] >= 0
            where = [at[cell] for cell in cells]
            assert torch.equal(part.weights[book][real], vectors.weights[book, where])
            assert torch.equal(part.points[book][real], vectors.points[book, where])


def test_a_hold_out_leaves_something_on_either_side():
    spec = make()
    vectors = split(spec, normal(1, 8), None)  # two vectors
    for share in (0.01, 0.99):
        train, test = sampling.hold_out(vectors, spec, 1, 8, share, seed=0)
        assert train.cells.shape == test.cells.shape == (1, 1)
    alone = split(spec, normal(1, 4), None)
    train, test = sampling.hold_out(alone, spec, 1, 4, 0.5, seed=0)
    assert train.cells.tolist() == [[0]]
    assert test.cells.shape == (1, 0)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(TensorError, match="give more than 0 and less than 1"):
            sampling.hold_out(vectors, spec, 1, 8, share, seed=0)


# --- coverage ---


def some_of(vectors, keep):
    return Vectors(vectors.points[:, keep], None, vectors.cells[:, keep])


def test_too_few_vectors_an_entry_are_warned_of():
    spec = make(stages=(16, 4))
    vectors = split(spec, normal(64, 64), None)  # 1024
    for size in (160, 161):
        sampling.sample(vectors, spec, 64, 64, size, seed=0)
    with pytest.warns(CoverageWarning, match=r"9.94 vectors an entry, of 10 needed") as caught:
        sampling.sample(vectors, spec, 64, 64, 159, seed=0)
    assert caught[0].filename == __file__
    (text,) = (str(one.message) for one in caught)
    assert "the 64 x 64 layer" in text
    assert "\n" not in text


def test_norms_past_the_samples_longest_are_warned_of():
    spec = make()
    matrix = normal(64, 64).clamp(-1, 1)
    matrix[5, :4] = 5.6  # 125 of about 2243 (without it: 2118): 5.6 %
    vectors = split(spec, matrix, None)
    longest = vectors.cells[0].tolist().index(5 * 16)
    others = [at for at in range(1024) if at != longest][::3]
    found = coverage(vectors, some_of(vectors, [*others, longest]), spec, 64, 64)
    assert found.beyond == 0
    for factor, warned in ((0.9, False), (1.0, True)):
        points = vectors.points.clone()
        points[0, longest] *= factor
        near = Vectors(points, None, vectors.cells)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = coverage(near, some_of(near, others), spec, 64, 64)
        beyond = float(points[0, longest].square().sum() / points.square().sum())
        assert found.beyond == pytest.approx(beyond, rel=1e-6)
        assert [str(one.message) for one in caught] == (
            ["the sample doesn't cover the 64 x 64 layer: 6% of the squared norms are past its "
             "longest vector; sample more vectors"] if warned else []
        )  # fmt: skip


@pytest.mark.parametrize("axis", ["in", "out"])
def test_channels_without_a_vector_are_warned_of(axis):
    spec = make(vector_axis=axis)
    matrix = torch.nn.functional.normalize(normal(40, 50, 4), dim=-1).reshape(40, 200)
    matrix = matrix if axis == "in" else matrix.reshape(40, 50, 4).permute(1, 2, 0).reshape(200, 40)
    n, k = matrix.shape
    vectors = split(spec, matrix, None)
    channel = vectors.cells[0] // 50 if axis == "in" else vectors.cells[0] % 40
    reached = some_of(vectors, channel < 36)
    assert coverage(vectors, reached, spec, n, k).unreached == pytest.approx(0.1)
    with pytest.warns(CoverageWarning, match="12% of the channels have no vector in it"):
        found = coverage(vectors, some_of(vectors, channel < 35), spec, n, k)
    assert found.unreached == pytest.approx(0.125)


def test_wide_layers_are_reached_by_stretches_of_channels():
    spec = make()
    vectors = split(spec, torch.ones(640, 8), None)
    every_tenth = vectors.cells[0] // 2 % 10 == 0
    assert coverage(vectors, some_of(vectors, every_tenth), spec, 640, 8).unreached == 0
    with pytest.warns(CoverageWarning, match="50% of the channels"):
        coverage(vectors, some_of(vectors, vectors.cells[0] < 640), spec, 640, 8)


def test_a_book_that_is_in_the_sample_as_a_whole_is_covered():
    spec = make(stages=(16,), group_axis="row", group_size=8)
    vectors = split(spec, normal(36, 160), None)  # books of 320 vectors, and one of 160
    kept = sampling.sample(vectors, spec, 36, 160, 200, seed=0)
    assert (kept.cells[-1] >= 0).sum() == 160
    found = coverage(vectors, kept, spec, 36, 160)
    assert found.per_entry == 200 / 16
    assert coverage(vectors, vectors, spec, 36, 160).per_entry == math.inf


# --- several layers ---


def test_layers_share_a_sample_by_their_size_and_the_smallest_is_in_it():
    spec = make()
    weights = {"large": normal(100, 160), "mid": normal(25, 160, seed=1), "tiny": normal(5, 16)}
    together = over_layers(weights, spec, 500, seed=0)
    assert together.cells.shape == (1, 500)
    cells = together.cells[0]
    counts = [int((cells < 4000).sum()), int(((cells >= 4000) & (cells < 5000)).sum())]
    assert int((cells >= 5000).sum()) == 20  # all it has: less than a quarter of 500 / 3
    assert counts[0] + counts[1] == 480
    assert 3 < counts[0] / counts[1] < 4  # sizes are as 4 to 1, and each has its least
    points = torch.cat([block(spec, one).reshape(-1, 4) for one in weights.values()])
    assert torch.equal(together.points[0], points[cells])
    truth = sum(float(one.square().sum()) for one in weights.values())
    found = float((together.points.square().sum(-1) * together.weights).sum())
    assert found == pytest.approx(truth, rel=0.02)


def test_all_vectors_of_all_layers():
    spec = make()
    weights = {"a": normal(8, 16), "b": normal(4, 16)}
    for size in (0, 48, 1000):
        together = over_layers(weights, spec, size, seed=0)
        assert together.weights is None
        assert together.cells.tolist() == [list(range(48))]


def test_a_layers_scales_and_limits_are_those_of_the_recipe():
    spec = make(scale_axis="row")
    weights = {"a": normal(40, 64)}
    weights["a"][3, :4] = 50.0
    plain = over_layers(weights, spec, 400, seed=0)
    limited = over_layers(weights, spec, 400, seed=0, recipe=Recipe(clip=2))
    largest = over_layers(weights, spec, 400, seed=0, recipe=Recipe(scaling="max"))
    assert float(plain.points.abs().max()) > 3.5
    assert float(limited.points.abs().max()) < 3.5
    assert float(largest.points.abs().max()) == pytest.approx(1, rel=1e-3)


def test_a_layers_importance_counts_in_its_sample():
    spec = make()
    weights = {"a": normal(40, 64), "b": normal(40, 64, seed=1)}
    importance = {"a": torch.ones(64)}
    importance["a"][:4] = 0
    together = over_layers(weights, spec, 400, seed=0, importance=importance)
    first = together.cells[0] < 640
    assert not bool((together.cells[0][first] % 16 == 0).any())
    assert bool((together.cells[0][~first] % 16 == 0).any())
    assert float(together.weights[0][first].sum()) == pytest.approx(600, rel=0.1)
    deep = {"a": torch.arange(64.0), "b": torch.ones(64)}
    assert over_layers(weights, spec, 400, seed=0, importance=deep).weights.ndim == 3


def test_layers_that_cannot_share_are_refused_in_one_line():
    spec = make()
    with pytest.raises(TensorError, match="no layers; give one"):
        over_layers({}, spec, 8, seed=0)
    with pytest.raises(TensorError, match=r"a: torch.int64 \[4\]; give matrices"):
        over_layers({"a": torch.arange(4)}, spec, 8, seed=0)
    with pytest.raises(TensorError, match="a: holds NaN"):
        over_layers({"a": torch.full((4, 4), math.nan)}, spec, 8, seed=0)
    with pytest.raises(TensorError, match="sample of 1 for 2 layers"):
        over_layers({"a": normal(4, 4), "b": normal(4, 4)}, spec, 1, seed=0)
    with pytest.raises(TensorError, match=r"a: importance \[3\] doesn't broadcast to \[4, 4\]"):
        over_layers({"a": normal(4, 4)}, spec, 0, seed=0, importance={"a": torch.ones(3)})
    grouped = make(group_axis="row", group_size=4)
    with pytest.raises(TensorError, match="1 to 2 codebooks in this format"):
        over_layers({"a": normal(4, 4), "b": normal(8, 4)}, grouped, 2, seed=0)


def test_a_poor_sample_of_the_layers_is_warned_of():
    spec = make(stages=(16,))
    weights = {"a": normal(40, 64), "b": normal(40, 64, seed=1)}
    over_layers(weights, spec, 160, seed=0)
    with pytest.warns(CoverageWarning, match=r"the 2 layers: 9.94 vectors an entry") as caught:
        over_layers(weights, spec, 159, seed=0)
    assert caught[0].filename == __file__
