"""Errors of a layer's outputs, token by token, against numpy's and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import paired_cosine_distances

from vqkernels.errors import TensorError
from vqkernels.quality import distortion, gaussian_inputs, output_error, pieces, run_error
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(vector_length=4, stages=(16, 4), method="rq", scale_axis="row")


def pair(n: int = 40, k: int = 24) -> tuple[torch.Tensor, QuantizedTensor]:
    tensor = random_tensor(SPEC, n, k, bias=True, fit=False)
    noise = torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tensor.decode() + 0.5 * noise, tensor


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_is_what_numpy_and_sklearn_find(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", size)
    weight, tensor = pair()
    x = gaussian_inputs(24, tokens=150, seed=3)
    y, near = (x @ weight.T).numpy(), (x @ tensor.decode().T).numpy()
    cosines = 1 - paired_cosine_distances(y, near)
    found = output_error(weight, tensor, x)
    assert found.tokens == 150
    assert found.error == pytest.approx(((y - near) ** 2).sum() / (y**2).sum(), rel=1e-12)
    assert found.mean == pytest.approx(cosines.mean(), rel=1e-12)
    assert found.low == pytest.approx(np.percentile(cosines, 1), rel=1e-12)
    assert found.worst == pytest.approx(cosines.min(), rel=1e-12)
    assert found.worst < found.low < found.mean < 1
    # over all tokens together it is what their gram tells
    assert found.error == pytest.approx(run_error(weight, tensor, x.T @ x).error, rel=1e-12)


def test_an_exact_matrix_has_no_error_and_one_bad_token_shows() -> None:
    _, tensor = pair()
    x = gaussian_inputs(24, tokens=200)  # norms are rounded, some of them down
    exact = output_error(tensor.decode(), tensor, x)
    assert (exact.error, exact.worst) == (0, pytest.approx(1, abs=1e-12))
    assert exact.mean <= 1
    # an input that only token 7 has, where the decode is wrong
    weight = tensor.decode()
    weight[:, 0] *= -1
    x[:, 0] = 0
    x[7, 0] = 100
    found = output_error(weight, tensor, x)
    assert found.worst < 0 < 0.99 < found.low
    assert found.mean < 1 - 1e-3


def test_tokens_of_zeros_are_alike_and_not_beside_something() -> None:
    weight, tensor = pair()
    zeros = torch.zeros(3, 24)
    found = output_error(weight, tensor, zeros)
    assert (found.error, found.mean, found.worst) == (0, 1, 1)
    found = output_error(torch.zeros_like(weight), tensor, gaussian_inputs(24))
    assert (found.error, found.mean) == (math.inf, 0)


def test_gaussian_inputs_lose_what_the_weights_lose() -> None:
    weight, tensor = pair()
    x = gaussian_inputs(24, tokens=5000)
    found = output_error(weight, tensor, x)
    assert found.error == pytest.approx(distortion(weight, tensor).relative_error, rel=0.03)
    assert torch.equal(x, gaussian_inputs(24, tokens=5000))
    assert not torch.equal(x, gaussian_inputs(24, tokens=5000, seed=1))


def test_equal_bits_on_one_thread_and_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 1 << 16)
    weight, tensor = pair(300, 400)  # large enough for torch to split its products
    x, before, found = gaussian_inputs(400), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(output_error(weight, tensor, x))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(3, 8), r"inputs: shape \[3, 8\], but the layer takes \[tokens, 24\]"),
        (torch.ones(0, 24), r"inputs: shape \[0, 24\]"),
        (torch.ones(24), r"inputs: shape \[24\]"),
        (torch.full((2, 24), math.nan), "inputs: hold NaN or infinity; calibrate again"),
    ],
)
def test_inputs_of_something_else_are_refused(inputs: torch.Tensor, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        output_error(*pair(), inputs)
