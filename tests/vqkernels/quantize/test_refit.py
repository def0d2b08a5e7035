import numpy as np
import pytest
import torch

from vqkernels.quantize import refit as module
from vqkernels.quantize.refit import decode, refit, revive, squared_errors


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(books=2, count=400, length=3, stages=(6, 5, 4)):
    points = normal(books, count, length)
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(e, (books, count), generator=generator) for e in stages]
    return points, codes, [normal(books, e, length, seed=2 + s) for s, e in enumerate(stages)]


def by_lstsq(points, codes, sizes, weights):
    """Sums of the entries that minimise the error, from the design matrix of ones and zeros."""
    decoded = torch.empty(points.shape, dtype=torch.float64)
    for book in range(len(points)):
        columns = [
            np.eye(size)[code[book].numpy()] for size, code in zip(sizes, codes, strict=True)
        ]
        design = np.concatenate(columns, axis=1)
        for j in range(points.shape[2]):
            root = np.sqrt(weights[book, :, j].numpy().astype(np.float64))
            right = root * points[book, :, j].numpy().astype(np.float64)
            found = np.linalg.lstsq(root[:, None] * design, right, rcond=None)[0]
            decoded[book, :, j] = torch.from_numpy(design @ found)
    return decoded


@pytest.mark.parametrize("path", ["factored", "gradients"])
@pytest.mark.parametrize("mass", ["none", "point", "coordinate"])
@pytest.mark.parametrize("stages", [(6, 5, 4), (20, 7), (9,)])
def test_least_squares_of_the_design_matrix(monkeypatch, path, mass, stages):
    monkeypatch.setattr(module, "DENSE_ROWS", 1024 if path == "factored" else 0)
    points, codes, codebooks = drawn(stages=stages)
    shape = {"none": (2, 400, 1), "point": (2, 400, 1), "coordinate": (2, 400, 3)}[mass]
    weights = torch.ones(shape) if mass == "none" else normal(*shape, seed=9).exp()
    each = weights.expand(points.shape)
    given = None if mass == "none" else weights if mass == "coordinate" else weights[..., 0]
    found = refit(points, codes, codebooks, weights=given)
    expected = by_lstsq(points, codes, stages, each)
    torch.testing.assert_close(decode(codes, found).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rows", [0, 1024])
def test_unused_entries_stay_where_they_are(monkeypatch, rows):
    monkeypatch.setattr(module, "DENSE_ROWS", rows)
    points, codes, codebooks = drawn()
    codes[1] = codes[1].clamp(max=2)
    weights = torch.ones(2, 400)
    weights[codes[2] == 3] = 0  # an entry of vectors that don't count is unused too
    found = refit(points, codes, codebooks, weights=weights)
    assert torch.equal(found[1][:, 3:], codebooks[1][:, 3:])
    assert torch.equal(found[2][:, 3], codebooks[2][:, 3])
    assert not torch.equal(found[0], codebooks[0])


def test_what_is_optimal_already_stays():
    points, codes, codebooks = drawn()
    once = refit(points, codes, codebooks)
    for first, second in zip(once, refit(points, codes, once), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_unused_entries_complete_the_worst_vectors():
    points, codes, codebooks = drawn(books=2)
    codes[1] = codes[1].clamp(max=3)
    codes[2][0] = codes[2][0].clamp(max=1)  # entries 2 and 3, in the first book only
    left = points - decode(codes, codebooks)
    weights = normal(2, 400, 3, seed=5).exp()
    found = revive(points, codes, codebooks, weights=weights)
    worst = squared_errors(left, weights).argsort(descending=True)
    moved = [(0, 1, 4), (0, 2, 2), (0, 2, 3), (1, 1, 4)]
    turn = {0: 0, 1: 0}
    for book, stage, entry in moved:
        vector = int(worst[book, turn[book]])
        turn[book] += 1
        others = sum(codebooks[s][book, codes[s][book, vector]] for s in range(3) if s != stage)
        torch.testing.assert_close(others + found[stage][book, entry], points[book, vector])
    for stage in (1, 2):
        kept = torch.ones(2, codebooks[stage].shape[1], dtype=torch.bool)
        for book, at, entry in moved:
            if at == stage:
                kept[book, entry] = False
        assert torch.equal(found[stage][kept], codebooks[stage][kept])


def test_entries_with_nothing_to_complete_stay():
    codebooks = [normal(1, 5, 3), torch.zeros(1, 4, 3)]
    codes = [torch.arange(4)[None], torch.zeros(1, 4, dtype=torch.int64)]
    found = revive(decode(codes, codebooks), codes, codebooks)
    assert all(torch.equal(*pair) for pair in zip(found, codebooks, strict=True))


@pytest.mark.parametrize("rows", [0, 1024])
def test_same_bits_on_any_number_of_threads(monkeypatch, threads, rows):
    monkeypatch.setattr(module, "DENSE_ROWS", rows)
    points, codes, codebooks = drawn(count=5000, stages=(200, 150))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(refit(points, codes, codebooks))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
