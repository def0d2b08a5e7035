import itertools

import numpy as np
import pytest
import torch

from vqkernels.errors import TensorError
from vqkernels.quantize import beam
from vqkernels.quantize.refit import decode, squared_errors


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(books=1, count=60, length=4, stages=(9, 7), seed=0):
    """Points and codebooks of shrinking entries."""
    points = normal(books, count, length, seed=seed)
    sizes = [normal(books, entries, length, seed=seed + 1 + s) for s, entries in enumerate(stages)]
    return points, [book / 2**stage for stage, book in enumerate(sizes)]


def lost(points, codes, codebooks, weights=None):
    exact = decode(codes, [book.double() for book in codebooks])
    return squared_errors(points.double() - exact, weights)


def exhaustive(points, codebooks, weights=None):
    """The least error of each point over all sums of entries, in float64."""
    best = []
    for number, book in enumerate(points):
        choices = itertools.product(*(range(entries.shape[1]) for entries in codebooks))
        sums = torch.stack(
            [sum(codebooks[s][number, c].double() for s, c in enumerate(choice))
             for choice in choices]
        )  # fmt: skip
        squares = (book.double()[:, None] - sums).square()
        if weights is not None:
            each = weights[number].double()
            squares = squares * (each[:, None] if each.ndim == 2 else each[:, None, None])
        best.append(squares.sum(-1).amin(1))
    return torch.stack(best)


@pytest.mark.parametrize("stages", [(9, 7), (5, 6, 4), (1, 8), (8, 1)])
@pytest.mark.parametrize("mass", ["none", "point", "coordinate"])
def test_a_beam_of_all_sums_is_an_exhaustive_search(stages, mass):
    points, codebooks = drawn(books=2, stages=stages)
    shape = {"none": None, "point": (2, 60), "coordinate": (2, 60, 4)}[mass]
    weights = None if shape is None else normal(*shape, seed=9).exp()
    enough = int(np.prod(stages[:-1]))
    codes = beam.encode(points, codebooks, weights=weights, beam=enough)
    torch.testing.assert_close(
        lost(points, codes, codebooks, weights),
        exhaustive(points, codebooks, weights),
        rtol=1e-5,
        atol=1e-6,
    )


def test_weights_of_coordinates_choose_other_codes():
    points, codebooks = drawn(count=200)
    weights = torch.tensor([100.0, 1, 1, 0]).expand(points.shape)
    plain, weighted = (beam.encode(points, codebooks, weights=w, beam=9) for w in (None, weights))
    errors = [lost(points, codes, codebooks, weights).sum() for codes in (plain, weighted)]
    assert errors[1] < 0.5 * errors[0]
    single = beam.encode(points, codebooks, weights=weights[..., 0], beam=9)
    assert torch.equal(torch.stack(single), torch.stack(plain))


def test_a_beam_of_1_is_greedy():
    points, codebooks = drawn(stages=(9, 7, 5))
    left = points[0].double()
    for code, book in zip(beam.encode(points, codebooks, beam=1), codebooks, strict=True):
        assert torch.equal(code[0], torch.cdist(left, book[0].double()).argmin(1))
        left = left - book[0, code[0]]


@pytest.mark.parametrize("width", [2, 5, 16])
@pytest.mark.parametrize("stages", [(256, 256), (64, 32, 16, 8)])
def test_faiss_finds_the_same_sums(faiss, width, stages):
    points, codebooks = drawn(count=500, length=8, stages=stages)
    bits = [int(np.log2(entries)) for entries in stages]
    sizes = faiss.UInt64Vector()
    for bit in bits:
        sizes.push_back(bit)
    theirs = faiss.ResidualQuantizer(8, sizes)
    faiss.copy_array_to_vector(torch.cat(codebooks, dim=1).numpy().ravel(), theirs.codebooks)
    theirs.is_trained = True
    theirs.max_beam_size = width
    packed = theirs.compute_codes(points[0].numpy())
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    start, expected = 0, []
    for bit in bits:
        expected.append(stream[:, start : start + bit] @ (1 << np.arange(bit)))
        start += bit
    found = beam.encode(points, codebooks, beam=width)
    same = np.stack([code[0].numpy() for code in found]) == np.stack(expected)
    # rounding decides between sums that are equally near
    assert same.all(0).mean() > 0.99
    ours, others = (
        lost(points, codes, codebooks).sum()
        for codes in (found, [torch.from_numpy(code.astype(np.int64))[None] for code in expected])
    )
    assert float(ours) == pytest.approx(float(others), rel=1e-4)


def test_a_wider_beam_is_nearer():
    points, codebooks = drawn(count=2000, length=8, stages=(64, 64, 64))
    errors = [
        float(lost(points, beam.encode(points, codebooks, beam=width), codebooks).sum())
        for width in (1, 4, 16)
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.98 * errors[1]


def test_entries_in_several_tiles(monkeypatch):
    points, codebooks = drawn(books=3, count=70, stages=(50, 40, 30))
    weights = normal(3, 70, 4).exp()
    whole = beam.encode(points, codebooks, weights=weights, beam=6)
    monkeypatch.setattr(beam, "TILE", 200)
    monkeypatch.setattr(beam, "TILE_ENTRIES", 16)
    parts = beam.encode(points, codebooks, weights=weights, beam=6)
    assert torch.equal(torch.stack(whole), torch.stack(parts))


@pytest.mark.parametrize("factor", [1e-30, 1e15])
def test_sizes_far_from_1(factor):
    points, codebooks = drawn(count=200)
    expected = beam.encode(points, codebooks, beam=4)
    far = beam.encode(points * factor, [book * factor for book in codebooks], beam=4)
    assert torch.equal(torch.stack(far), torch.stack(expected))


def test_points_far_from_0():
    points, codebooks = drawn(count=200)
    shifted = [codebooks[0] / 256 + 1000, codebooks[1] / 256]
    codes = beam.encode(points / 256 + 1000, shifted, beam=9)
    best = exhaustive(points / 256 + 1000, shifted).sum()
    assert float(lost(points / 256 + 1000, codes, shifted).sum()) <= 1.001 * float(best)


def test_same_codes_on_any_number_of_threads(threads):
    points, codebooks = drawn(books=2, count=3000, length=8, stages=(64, 64))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(torch.stack(beam.encode(points, codebooks, beam=8)))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam": 0}, "beam 0, 2 stages"),
        ({"codebooks": []}, "beam 4, 0 stages"),
        ({"points": torch.zeros(60, 4)}, r"points \[60, 4\]"),
        ({"codebooks": [torch.zeros(1, 9, 5)]}, r"codebook 0 is \[1, 9, 5\]"),
        ({"weights": torch.ones(1, 59)}, r"weights \[1, 59\]"),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(change, message):
    points, codebooks = drawn()
    given = {"points": points, "codebooks": codebooks, "beam": 4, **change}
    with pytest.raises(TensorError, match=message) as caught:
        beam.encode(given.pop("points"), given.pop("codebooks"), **given)
    assert "\n" not in str(caught.value)
