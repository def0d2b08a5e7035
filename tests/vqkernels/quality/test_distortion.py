"""Errors of weights and of outputs over a run, against numpy's and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from vqkernels.errors import TensorError
from vqkernels.quality import distortion, pieces, run_error
from vqkernels.quantize import relative_error
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPECS = [
    CodebookSpec(vector_length=4, stages=(16, 4), method="rq", scale_axis="row"),
    CodebookSpec(vector_length=4, stages=(8,), vector_axis="out", stride=2, permuted=True),
    CodebookSpec(vector_length=4, stages=(8,), group_axis="row", group_size=8, rotation_size=4),
    CodebookSpec(
        vector_length=4,
        stages=(16,),
        vector_axis="out",
        outlier_columns=2,
        outlier_entries=4,
        outlier_vector_length=2,
        zero_axis="column",
    ),
]


def pair(
    spec: CodebookSpec, n: int = 40, k: int = 24, seed: int = 0
) -> tuple[torch.Tensor, QuantizedTensor]:
    """A weight, and a tensor that decodes to something near it."""
    tensor = random_tensor(spec, n, k + spec.side_columns, seed=seed, fit=False)
    noise = torch.randn(n, k + spec.side_columns, generator=torch.Generator().manual_seed(seed))
    return (tensor.decode() + 0.3 * noise.double()).float(), tensor


def inputs(k: int, tokens: int = 60) -> torch.Tensor:
    """Unlike one another, and correlated."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mix


@pytest.fixture(params=[10, 1 << 20], ids=["pieces", "whole"], autouse=True)
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", request.param)


@pytest.mark.parametrize("spec", SPECS)
def test_is_what_numpy_and_sklearn_find(spec: CodebookSpec) -> None:
    weight, tensor = pair(spec)
    w, decoded = weight.double().numpy(), tensor.decode().numpy()
    diagonal = np.linspace(0.1, 3, w.shape[1])
    found = distortion(weight, tensor, diagonal=torch.from_numpy(diagonal).float())
    assert found.mse == pytest.approx(np.mean((w - decoded) ** 2), rel=1e-12)
    assert found.relative_error == pytest.approx(relative_error(weight, tensor), rel=1e-12)
    expected = cosine_similarity(w.reshape(1, -1), decoded.reshape(1, -1))
    assert found.cosine == pytest.approx(expected.item(), rel=1e-12)
    assert found.max_error == np.abs(w - decoded).max()
    lost, whole = ((one**2 * diagonal).sum() for one in (w - decoded, w))
    assert found.weighted_error == pytest.approx(lost / whole, rel=1e-6)  # a float32 diagonal


@pytest.mark.parametrize("spec", SPECS)
def test_the_gram_tells_what_the_inputs_would(spec: CodebookSpec) -> None:
    weight, tensor = pair(spec)
    x = inputs(weight.shape[1])
    y, found = x @ weight.double().T, x @ tensor.decode().T
    run = run_error(weight, tensor, x.T @ x / len(x))
    assert run.error == pytest.approx(float((y - found).square().sum() / y.square().sum()))
    expected = cosine_similarity(y.reshape(1, -1), found.reshape(1, -1))
    assert run.cosine == pytest.approx(expected.item(), rel=1e-12)
    # and it isn't the weights' own error in disguise
    assert abs(run.error - distortion(weight, tensor).relative_error) > 0.05 * run.error


def test_a_diagonal_gram_weighs_as_its_diagonal() -> None:
    weight, tensor = pair(SPECS[0])
    diagonal = torch.linspace(0, 2, weight.shape[1])
    run = run_error(weight, tensor, torch.diag(diagonal))
    found = distortion(weight, tensor, diagonal=diagonal)
    assert found.weighted_error == pytest.approx(run.error, rel=1e-12)
    assert found.weighted_error != pytest.approx(found.relative_error, rel=0.01)


def test_an_exact_matrix_has_no_error_and_a_swapped_code_shows() -> None:
    tensor = random_tensor(SPECS[0], 40, 24, fit=False)
    weight, gram = tensor.decode(), inputs(24).T @ inputs(24)
    found, run = (
        distortion(weight, tensor, diagonal=gram.diagonal()),
        run_error(weight, tensor, gram),
    )
    assert (found.mse, found.relative_error, found.max_error, found.weighted_error) == (0, 0, 0, 0)
    assert found.cosine == pytest.approx(1, abs=1e-15)
    assert (run.error, run.cosine) == (0, pytest.approx(1, abs=1e-15))
    for change in (-5.0, 5.0):
        other = weight.clone()
        other[7, 7] += change
        assert distortion(other, tensor).max_error == pytest.approx(5)
    codes = tensor.parts["codes"].clone()
    codes[-1, -1, 0] ^= 1
    swapped = tensor.replace_parts(codes=codes)
    assert distortion(weight, swapped).relative_error > 1e-5
    assert distortion(weight, swapped).cosine < 1 - 1e-6
    assert run_error(weight, swapped, gram).error > 1e-6


def test_what_rounding_carries_past_its_end_is_brought_back() -> None:
    assert pieces.share(-1e-20, 1.0) == 0
    assert pieces.cosine(1 + 1e-15, 1.0, 1.0) == 1
    assert pieces.cosine(-1 - 1e-15, 1.0, 1.0) == -1


def test_of_zeros_either_all_or_nothing_is_lost() -> None:
    tensor = random_tensor(SPECS[0], 8, 8, fit=False)
    nothing = tensor.replace_parts(scale=torch.zeros_like(tensor.parts["scale"]))
    zeros, gram = torch.zeros(8, 8), torch.eye(8)
    exact = distortion(zeros, nothing, diagonal=torch.ones(8))
    assert (exact.relative_error, exact.cosine, exact.weighted_error) == (0, 1, 0)
    lost = distortion(zeros, tensor, diagonal=torch.ones(8))
    assert (lost.relative_error, lost.cosine, lost.weighted_error) == (math.inf, 0, math.inf)
    assert run_error(zeros, tensor, gram).error == math.inf
    # inputs that are never anything but zero hide every error
    assert distortion(zeros, tensor, diagonal=torch.zeros(8)).weighted_error == 0


def test_equal_bits_on_one_thread_and_on_two() -> None:
    # large enough for torch to split its products and sums
    weight, tensor = pair(SPECS[0], 300, 400)
    gram = inputs(400).T @ inputs(400)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((distortion(weight, tensor), run_error(weight, tensor, gram)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_such_matrix_is_refused(value: float) -> None:
    weight, tensor = pair(SPECS[0], 8, 8)
    with pytest.raises(TensorError, match=r"weight: shape \[8, 4\], but the tensor is 8 x 8"):
        distortion(weight[:, :4], tensor)
    weight[3, 3] = value
    with pytest.raises(TensorError, match="weight: holds NaN, infinity or whole numbers"):
        distortion(weight, tensor)
    with pytest.raises(TensorError, match="whole numbers"):
        distortion(torch.ones(8, 8, dtype=torch.int32), tensor)


def test_a_calibration_of_something_else_is_refused() -> None:
    weight, tensor = pair(SPECS[0], 8, 8)
    with pytest.raises(TensorError, match=r"diagonal: shape \[4\], but the layer needs \[8\]"):
        distortion(weight, tensor, diagonal=torch.ones(4))
    with pytest.raises(TensorError, match=r"gram: shape \[8, 4\], but the layer needs \[8, 8\]"):
        run_error(weight, tensor, torch.ones(8, 4))
    for bad in (-torch.eye(8), torch.full((8, 8), math.nan)):
        with pytest.raises(TensorError, match="gram: holds NaN, infinity or negative squares"):
            run_error(weight, tensor, bad)
