import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from scipy.stats import kstest
from sklearn.decomposition import PCA

from vqkernels.errors import UnsupportedError
from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.quantize.rotation import hadamard, random_rotation, rotate, whitening
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32",
                           "side_dtype": "float32"} | fields)  # fmt: skip


def orthogonal(matrix):
    return torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)).double(), atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_hadamard_is_scipys_with_signs(size):
    found = hadamard(size, seed=0) * size**0.5
    signs = found[0]
    assert set(signs.round(decimals=9).tolist()) <= {-1, 1}
    expected = scipy_hadamard(size) * signs.numpy()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_the_seed_decides_the_signs():
    assert not torch.equal(hadamard(64, seed=0), hadamard(64, seed=1))
    assert torch.equal(hadamard(64, seed=1), hadamard(64, seed=1))
    assert abs(float(hadamard(1024, seed=0)[0].sign().sum())) < 150  # 32 is one deviation


@pytest.mark.parametrize("size", [3, 12, 96, 384, 13])
def test_sizes_that_are_no_power_of_two_are_orthogonal_and_flat(size):
    found = hadamard(size, seed=0)
    assert orthogonal(found)
    assert float(found.abs().max()) <= (2 / size) ** 0.5 + 1e-12


def test_random_rotations_are_haar():
    found = random_rotation(48, seed=0)
    assert orthogonal(found)
    # an entry's square is Beta(1/2, (size - 1) / 2); without fixed signs the diagonal leans
    entries = torch.cat([random_rotation(24, seed=seed) for seed in range(40)])
    squares = entries.square().flatten()[::7].numpy()
    assert kstest(squares, "beta", args=(0.5, 11.5)).pvalue > 0.01
    diagonal = torch.stack([random_rotation(4, seed=seed).diagonal() for seed in range(200)])
    assert float(diagonal.mean().abs()) < 0.06


def correlated(rows=512, size=16):
    mixing = 2 * torch.eye(size) + 0.4 * normal(size, size, seed=5)
    return normal(rows, 4 * size) @ torch.block_diag(*[mixing] * 4) + 2


def test_whitened_columns_have_unit_covariance():
    weight = correlated()
    tensor = quantize(
        weight, make(rotation_size=16), recipe=Recipe(rotation="whitening", iterations=1)
    )
    root = tensor.parts["rotation"].double()
    assert torch.allclose(root, root.T, atol=1e-5)
    blocks = weight.double().reshape(-1, 16)
    coded = blocks @ root.inverse()
    covariance = np.cov(coded.numpy(), rowvar=False, ddof=0)
    np.testing.assert_allclose(covariance, np.eye(16), atol=1e-4)
    # the same as scikit-learn's whitening, up to an orthogonal matrix
    expected = PCA(whiten=True).fit_transform(blocks.numpy())
    centred = (coded - coded.mean(0)).numpy()
    between = expected.T @ centred / len(centred)
    np.testing.assert_allclose(between @ between.T, np.eye(16), atol=1e-2)
    np.testing.assert_allclose(expected @ between, centred, atol=1e-2)


def test_whitening_of_what_varies_little_or_not_keeps_an_inverse():
    assert torch.equal(whitening(torch.ones(8, 8), 4, resolution=1e-3), torch.eye(4).double())
    flat = normal(64, 8)
    flat[:, 3] = 2 * flat[:, 2]
    spec = make(rotation_size=8, side_dtype="float16")
    tensor = quantize(flat, spec, recipe=Recipe(rotation="whitening"))
    tensor.validate()
    assert relative_error(flat, tensor) < 0.3


def test_a_rotation_without_an_inverse_is_refused():
    spec = make(rotation_size=8, side_dtype="float16")
    with pytest.raises(UnsupportedError, match=r"rotation has no inverse.*side_dtype float32"):
        quantize(normal(16, 16) * 1e-10, spec, recipe=Recipe(rotation="whitening"))


# --- what a rotation does to errors ---


@pytest.mark.parametrize("kind", ["hadamard", "random", "whitening"])
def test_the_target_decodes_to_the_weight(kind):
    weight = correlated(64)
    tensor = quantize(weight, make(rotation_size=16, side_dtype="float16"),
                      recipe=Recipe(rotation=kind))  # fmt: skip
    rotation = tensor.parts["rotation"]
    target = rotate(Target(weight, limited=weight / 2), rotation)
    back = (target.matrix.double().reshape(-1, 16) @ rotation.double()).reshape(64, 64)
    torch.testing.assert_close(back, weight.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.limited, target.matrix / 2)


@pytest.mark.parametrize("kind", ["hadamard", "whitening"])
def test_a_hessian_goes_through(kind):
    weight, inputs = correlated(32), normal(200, 64, seed=2)
    hessian, rows = inputs.T @ inputs, normal(32, seed=3).square()
    rotation = (hadamard(16, seed=0) if kind == "hadamard"
                else whitening(weight, 16, resolution=1e-6))  # fmt: skip
    found = rotate(Target(weight, None, hessian, rows), rotation)
    error = normal(32, 64, seed=4)  # of what is coded
    decoded = (error.reshape(-1, 16).double() @ rotation).reshape(32, 64)
    expected = torch.einsum("ri,ij,rj,r->", decoded, hessian.double(), decoded, rows.double())
    actual = torch.einsum("ri,ij,rj,r->", error, found.hessian, error, found.rows)
    assert float(actual) == pytest.approx(float(expected), rel=1e-4)
    torch.testing.assert_close(found.weights, found.hessian.diagonal() * rows[:, None])


@pytest.mark.parametrize("kind", ["hadamard", "whitening"])
def test_weights_are_the_mean_over_independent_errors(kind):
    # errors of one coordinate at a time: what the diagonal of R diag(w) R^T says exactly
    weight, weights = correlated(4), normal(4, 64, seed=2).square()
    rotation = (hadamard(16, seed=0) if kind == "hadamard"
                else whitening(weight, 16, resolution=1e-6))  # fmt: skip
    found = rotate(Target(weight, weights), rotation)
    for column in (0, 7, 37, 63):
        error = torch.zeros(4, 64, dtype=torch.float64)
        error[:, column] = normal(4, seed=column).double()
        decoded = (error.reshape(-1, 16) @ rotation).reshape(4, 64)
        expected = (decoded.square() * weights).sum()
        assert float((error.square() * found.weights).sum()) == pytest.approx(float(expected))


def test_even_weights_stay_one_a_row():
    rows = normal(8, 1).square()
    assert rotate(Target(normal(8, 32)), hadamard(16, seed=0)).weights is None
    even = rotate(Target(normal(8, 32), rows.expand(8, 32)), hadamard(16, seed=0).bfloat16())
    assert torch.equal(even.weights, rows.expand(8, 32))
    stretched = rotate(Target(normal(8, 32)), 2 * hadamard(16, seed=0))
    torch.testing.assert_close(stretched.weights, torch.full((8, 32), 4.0))


# --- what it is good for ---


def test_a_rotation_lowers_the_error_of_vectors_that_cross_outlier_columns():
    # every 16th input feature is 5 times as large; vectors along out lie in one column each
    weight = normal(512, 128)
    weight[:, ::16] *= 5
    plain, hadamards, randoms = (
        relative_error(weight, quantize(weight, spec, recipe=recipe))
        for spec, recipe in (
            (make(vector_axis="out"), Recipe()),
            (make(vector_axis="out", rotation_size=128), Recipe()),
            (make(vector_axis="out", rotation_size=128), Recipe(rotation="random")),
        )
    )
    # measured: 0.436, 0.341, 0.348
    assert max(hadamards, randoms) < 0.85 * plain


def test_opq_learns_its_rotation_unless_another_is_asked_for():
    weight = correlated(96) * torch.linspace(0.2, 3, 64)
    spec = make(subspaces=4, rotation_size=16, method="opq")
    errors = {
        kind: relative_error(
            weight, quantize(weight, spec, recipe=Recipe(rotation=kind, iterations=8))
        )
        for kind in ("auto", "learned", "hadamard")
    }
    assert errors["auto"] == errors["learned"] < 0.9 * errors["hadamard"]


def test_each_kind_is_another(threads):
    weight, spec = correlated(64), make(rotation_size=16)
    kinds = ("auto", "random", "whitening", "learned")
    found = {}
    for kind in kinds:
        recipe = Recipe(rotation=kind, iterations=2)
        both = []
        for count in (1, 2):
            torch.set_num_threads(count)
            both.append(quantize(weight, spec, recipe=recipe).parts)
        for name, part in both[0].items():
            assert torch.equal(part, both[1][name]), name
        found[kind] = both[0]["rotation"]
    for kind in kinds[1:]:
        assert not torch.allclose(found["auto"], found[kind])
