import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from vqkernels.quantize import Recipe, opq, quantize, relative_error
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec

QUICK = Recipe(iterations=8)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32"}
                        | fields)  # fmt: skip


def correlated(n=256, k=64, size=8):
    """Rows whose blocks of `size` columns are mixed from axes of very different lengths."""
    mixing = torch.linalg.qr(normal(size, size, seed=5)).Q
    axes = normal(n, k // size, size) * torch.logspace(1, -1, size)
    return (axes @ mixing).reshape(n, k), mixing


def error_of(weight, rotation, spec, recipe=QUICK):
    """Relative error where `weight = coded @ rotation`, coded by the spec without a rotation."""
    size = len(rotation)
    coded = (weight.double().reshape(-1, size) @ rotation.double().T).reshape(weight.shape).float()
    return relative_error(coded, quantize(coded, spec, recipe=recipe))


@pytest.mark.parametrize(
    "fields",
    [
        {"subspaces": 2},
        {"vector_axis": "out"},
        {"stages": (8, 8), "subspaces": 2},
        {"group_axis": "row", "group_size": 64, "subspaces": 2},
        {"vector_length": 3},
    ],
)
def test_it_is_orthogonal(fields):
    weight, _ = correlated()
    found = opq.rotation(Target(weight), make(rotation_size=8, **fields), QUICK, seed=0)
    torch.testing.assert_close(found @ found.T, torch.eye(8, dtype=torch.float64))


def test_correlated_columns_gain():
    weight, _ = correlated()
    spec = make(subspaces=2, method="pq")
    found = opq.rotation(Target(weight), make(subspaces=2, rotation_size=8), QUICK, seed=0)
    assert error_of(weight, found, spec) < 0.7 * error_of(weight, torch.eye(8), spec)


def test_faiss_learns_no_better_rotation(faiss):
    weight, _ = correlated(n=512)
    spec = make(subspaces=2, method="pq")
    theirs = faiss.OPQMatrix(8, 2)
    theirs.pq = faiss.ProductQuantizer(8, 2, 4)
    theirs.train(weight.reshape(-1, 8).numpy())
    matrix = faiss.vector_to_array(theirs.A).reshape(8, 8)  # their coded = A x
    ours = opq.rotation(Target(weight), make(subspaces=2, rotation_size=8), QUICK, seed=0)
    assert error_of(weight, ours, spec) <= 1.02 * error_of(weight, torch.from_numpy(matrix), spec)


@pytest.mark.parametrize("weighted", [False, True])
def test_procrustes_is_scipys(weighted):
    weight, decoded = normal(50, 16), normal(50, 16, seed=1)
    rows = normal(50, 1, seed=2).exp() if weighted else torch.ones(50, 1)
    target = Target(weight, rows.expand(50, 16) if weighted else None)
    found, error = opq._procrustes(target, decoded, 8)
    root = rows.expand(50, 2).reshape(-1, 1).sqrt().numpy().astype(np.float64)
    left, right = (root * m.numpy().astype(np.float64).reshape(-1, 8) for m in (decoded, weight))
    expected, _ = orthogonal_procrustes(left, right)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert error == pytest.approx(np.square(left @ expected - right).sum(), rel=1e-6)


def test_principal_axes_are_dealt_out_evenly():
    weight, mixing = correlated(n=2048)
    start = opq._parametric(Target(weight), make(subspaces=2, rotation_size=8))
    overlap = (start.float() @ mixing.T).abs()
    axis = overlap.argmax(1)
    assert overlap.amax(1).min() > 0.99
    # lengths from 10 to 0.1 in equal ratios: an axis's number is the logarithm of its variance
    assert abs(int(axis[:4].sum()) - int(axis[4:].sum())) <= 1
    assert sorted(axis.tolist()) == list(range(8))


def test_rows_count_by_their_weight():
    weight, _ = correlated(n=512)
    other = weight.flip(1)  # another mixing
    both = torch.cat([weight, other])
    heavy = torch.ones(1024, 1)
    heavy[:512] = 1e6
    spec = make(subspaces=2, rotation_size=8)
    found = opq.rotation(Target(both, heavy.expand(1024, 64)), spec, QUICK, seed=0)
    plain = make(subspaces=2, method="pq")
    alone = opq.rotation(Target(weight), spec, QUICK, seed=0)
    assert error_of(weight, found, plain) < 1.05 * error_of(weight, alone, plain)


def test_a_sample_of_rows_serves(monkeypatch):
    weight, _ = correlated(n=1024)
    spec, plain = make(subspaces=2, rotation_size=8), make(subspaces=2, method="pq")
    seen = []
    learn = opq._learned
    monkeypatch.setattr(
        opq, "_learned", lambda some, *rest: (seen.append(some), learn(some, *rest))[1]
    )
    few = opq.rotation(Target(weight), spec, Recipe(iterations=8, sample=1024), seed=0)
    assert [tuple(some.matrix.shape) for some in seen] == [(128, 64)] * 3
    whole = opq.rotation(Target(weight), spec, QUICK, seed=0)
    assert error_of(weight, few, plain) < 1.1 * error_of(weight, whole, plain)


def test_an_all_zero_weight_has_a_rotation():
    found = opq.rotation(Target(torch.zeros(64, 64)), make(rotation_size=8), QUICK, seed=0)
    torch.testing.assert_close(found @ found.T, torch.eye(8, dtype=torch.float64))


def test_same_bits_on_any_number_of_threads(threads):
    weight, _ = correlated()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(
            opq.rotation(Target(weight), make(subspaces=2, rotation_size=8), QUICK, seed=0)
        )
    assert torch.equal(*found)
