import numpy as np
import pytest
import torch

from tests.vqkernels.quantize.hessians import correlated, normal
from vqkernels.errors import TensorError
from vqkernels.quantize import Recipe, propagate
from vqkernels.quantize.layout import join
from vqkernels.quantize.propagate import column_order, compensate, encode
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32"}
                        | fields)  # fmt: skip


def coded(target, spec, entries, damping=0.01):
    """Codes in the order of the code grid, by the module under test."""
    found = encode(target, spec, entries, Recipe(beam=1, damping=damping))
    n, k = target.matrix.shape
    return join(spec, n, k, target.vectors(spec).cells, found).long()


def gptq(weight, hessian, levels, damping):
    """GPTQ from OBQ's formulas (Frantar et al. 2022, eq. 2 and 3), one input at a time.

    The inverse over the inputs left is formed anew for each, without a Cholesky factor.
    """
    n, k = weight.shape
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(k)
    left, weight = list(np.argsort(-np.diag(hessian), kind="stable")), weight.copy()
    codes = np.zeros((n, k), np.int64)
    while left:
        inverse, first = np.linalg.inv(hessian[np.ix_(left, left)]), left[0]
        codes[:, first] = np.abs(weight[:, first, None] - levels).argmin(1)
        error = (weight[:, first] - levels[codes[:, first]]) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("axis", ["in", "out"])
def test_scalars_on_a_uniform_grid_are_gptq(axis):
    weight, hessian = normal(30, 40), correlated(40, seed=5)
    levels = torch.linspace(-2.5, 2.5, 8)
    spec = make(vector_length=1, stages=(8,), vector_axis=axis)
    codes = coded(Target(weight, None, hessian), spec, [levels[None, :, None]])
    expected = gptq(weight.double().numpy(), hessian.double().numpy(), levels.numpy(), 0.01)
    assert np.array_equal(codes[..., 0].numpy(), expected)
    plain = (weight[..., None] - levels).abs().argmin(-1)
    assert (codes[..., 0] != plain).float().mean() > 0.2


def gptvq(weight, hessian, entries, mass, width, length):
    """Vectors along the inputs, GPTQ a block at a time, from the block form of OBQ's formulas."""
    n, k = weight.shape
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(k)
    blocks = [list(range(first, min(first + length, k))) for first in range(0, k, length)]
    order = np.argsort([-sum(hessian[i, i] for i in block) for block in blocks], kind="stable")
    weight, codes = weight.copy(), np.zeros((n // width, len(blocks)), np.int64)
    for turn, number in enumerate(order):
        block = blocks[number]
        rest = [i for later in order[turn + 1 :] for i in blocks[later]]
        inverse = np.linalg.inv(hessian[np.ix_(block + rest, block + rest)])
        metric = np.linalg.inv(inverse[: len(block), : len(block)])
        for row in range(n // width):
            rows = slice(row * width, (row + 1) * width)
            book = entries.reshape(-1, width, length)[..., : len(block)]
            away = weight[rows, block] - book
            costs = np.einsum("ewi,ij,ewj,w->e", away, metric, away, mass[rows])
            codes[row, number] = costs.argmin()
            error = away[codes[row, number]] @ metric
            weight[rows, rest] -= error @ inverse[: len(block), len(block) :]
    return codes


@pytest.mark.parametrize(("width", "k"), [(1, 24), (2, 24), (2, 22)])
def test_vectors_along_in_are_gptvq(width, k):
    weight, hessian, mass = normal(20, k), correlated(k, seed=9), normal(20, seed=3).exp()
    entries = normal(16, 4 * width, seed=1)
    spec = make(vector_width=width)
    codes = coded(Target(weight, None, hessian, mass), spec, [entries[None]])
    numbers = [value.double().numpy() for value in (weight, hessian, entries, mass)]
    assert np.array_equal(codes[..., 0].numpy(), gptvq(*numbers, width, 4))


def test_lazy_blocks_change_nothing(monkeypatch):
    target, entries = Target(normal(24, 48), None, correlated(48)), [normal(1, 16, 4, seed=1)]
    for axis in ("in", "out"):
        found = []
        for lazy in (128, 8, 1):
            monkeypatch.setattr(propagate, "LAZY", lazy)
            found.append(coded(target, make(vector_axis=axis), entries))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_the_last_column_makes_up_for_the_others():
    # two inputs that are always equal: what one loses, the other one gives back
    hessian = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    weight = torch.full((1, 2), 0.4)
    spec = make(vector_length=1, stages=(2,))
    codes = coded(Target(weight, None, hessian), spec, [torch.tensor([[[0.0], [1.0]]])])
    assert sorted(codes.flatten().tolist()) == [0, 1]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_are_left_alone(damping):
    hessian = correlated(12)
    hessian[4], hessian[:, 4] = 0, 0
    entries = [normal(1, 16, 4, seed=1)]
    spec = make(vector_axis="out")
    codes = coded(Target(normal(16, 12), None, hessian), spec, entries, damping)
    keep = [i for i in range(12) if i != 4]
    # the mean that damping is a share of counts the dead input too
    alive = Target(normal(16, 12)[:, keep], None, hessian[keep][:, keep])
    assert torch.equal(codes[:, keep], coded(alive, spec, entries, damping * 11 / 12))


def test_dead_inputs_inside_a_vector_choose_no_code():
    hessian, weight, entries = correlated(12), normal(40, 12), [normal(1, 16, 4, seed=1)]
    hessian[4], hessian[:, 4] = 0, 0
    other = weight.clone()
    other[:, 4] += 3
    codes = [coded(Target(some, None, hessian), make(), entries, 0.0) for some in (weight, other)]
    assert torch.equal(*codes)


def test_nothing_seen_at_all_gives_the_nearest_entries():
    weight, entries = normal(16, 12), normal(16, 4, seed=1)
    codes = coded(Target(weight, None, torch.zeros(12, 12)), make(), [entries[None]])
    nearest = torch.cdist(weight.reshape(-1, 4), entries).argmin(1)
    assert torch.equal(codes.flatten(), nearest)


def test_a_hessian_that_is_none_is_refused():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 3
    with pytest.raises(TensorError, match="not positive definite, even damped") as caught:
        coded(Target(normal(8, 8), None, hessian), make(), [normal(1, 16, 4)])
    assert "\n" not in str(caught.value)


def test_fewer_tokens_than_inputs_need_damping():
    hessian = correlated(32, tokens=8)
    target, entries = Target(normal(8, 32), None, hessian), [normal(1, 16, 4)]
    assert coded(target, make(), entries).shape == (8, 8, 1)
    with pytest.raises(TensorError, match="raise the recipe's damping"):
        coded(Target(normal(8, 32), None, hessian - 1e-3 * torch.eye(32)), make(), entries, 0.0)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch, axis):
    monkeypatch.setattr("vqkernels.quantize.products.PIECE", 64)
    target, entries = Target(normal(320, 160), None, correlated(160)), [normal(1, 16, 8, seed=1)]
    spec, found = make(vector_length=8, vector_axis=axis), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(coded(target, spec, entries))
        assert torch.get_num_threads() == count
    assert torch.equal(*found)


def test_heavy_inputs_come_first_and_equal_ones_stay_in_order():
    assert column_order(torch.tensor([1.0, 3.0, 1.0, 5.0, 3.0])).tolist() == [3, 1, 4, 0, 2]


def test_compensation_is_least_squares_on_the_inputs():
    inputs = normal(60, 10, seed=2).double() @ normal(10, 10, seed=3).double()
    hessian = inputs.T @ inputs
    side, main = torch.tensor([7, 2]), torch.tensor([0, 1, 3, 4, 5, 6, 8, 9])
    weight, error = normal(5, 8).double(), normal(5, 2, seed=1).double()
    found = compensate(weight, error, hessian, side, main, 0.0)
    # the main columns that give the most of what the sides lost: X_m shift = X_s error
    shift = np.linalg.lstsq(inputs[:, main].numpy(), (inputs[:, side] @ error.T).numpy())[0]
    np.testing.assert_allclose((found - weight).numpy(), shift.T, rtol=1e-8)
    assert np.abs(shift).max() > 0.1


def test_much_damping_compensates_little():
    weight, hessian = normal(5, 8), correlated(10)
    side, main = torch.arange(2), torch.arange(2, 10)
    moved = [
        (compensate(weight, torch.ones(5, 2), hessian, side, main, damping) - weight).norm()
        for damping in (0.0, 0.1, 10.0, 1e6)
    ]
    assert moved[0] > moved[1] > moved[2] > 1e4 * moved[3]
    assert compensate(weight, torch.ones(5, 2), hessian, side, main, 0.01).dtype == torch.float32
