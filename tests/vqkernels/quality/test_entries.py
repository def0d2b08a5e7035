"""What int8 entries cost, against least squares by numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vqkernels.quality import distortion, rounding_cost, with_best_entries
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor


def weight(n: int = 48, k: int = 32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(2))


def test_the_best_entries_of_one_stage_are_the_means_of_their_vectors() -> None:
    spec = CodebookSpec(vector_length=4, stages=(8,), codebook_dtype="int8")
    tensor = quantize(weight(), spec)
    vectors = weight().reshape(-1, 4).double()
    codes = tensor.parts["codes"].flatten().long()
    means = torch.stack([vectors[codes == entry].mean(0) for entry in range(8)])
    best = with_best_entries(weight(), tensor)
    assert best.spec == dataclasses.replace(spec, codebook_dtype="float32")
    best.validate()
    torch.testing.assert_close(best.parts["codebook_0"][0, 0].double(), means, rtol=1e-5, atol=1e-6)
    least = float((vectors - means[codes]).square().sum() / vectors.square().sum())
    stored = distortion(weight(), tensor).relative_error
    assert rounding_cost(weight(), tensor) == pytest.approx(stored / least - 1, rel=1e-4)
    assert 0 < rounding_cost(weight(), tensor) < 0.01


def test_the_best_entries_of_stages_solve_their_normal_equations() -> None:
    spec = CodebookSpec(
        method="rq", vector_length=4, stages=(8, 4), codebook_dtype="int8", coefficients=(1, 0.5)
    )
    tensor = random_tensor(spec, 48, 32)
    rows = weight().reshape(-1, 4).double().numpy()
    codes = tensor.parts["codes"].flatten(0, 1).long().numpy()
    matrix = np.zeros((len(rows), 12))
    matrix[np.arange(len(rows)), codes[:, 0]] = 1
    matrix[np.arange(len(rows)), 8 + codes[:, 1]] = 1
    found, *_ = np.linalg.lstsq(matrix, rows, rcond=None)
    least = ((rows - matrix @ found) ** 2).sum() / (rows**2).sum()
    best = with_best_entries(weight(), tensor)
    assert distortion(weight(), best).relative_error == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_axis": "row", "zero_axis": "column"},
        {"permuted": True, "rotation_size": 8, "vector_axis": "out"},
        {"group_axis": "row", "group_size": 12, "subspaces": 2, "method": "pq"},
        {"outlier_columns": 4, "outlier_entries": 8, "outlier_vector_length": 2},
    ],
)
def test_nothing_else_moves_and_the_error_never_grows(fields: dict[str, object]) -> None:
    spec = CodebookSpec.from_dict(
        {"vector_length": 4, "stages": [8, 8], "codebook_dtype": "int8", **fields}
    )
    tensor = random_tensor(spec, 48, 32 + spec.side_columns, seed=3)
    noise = weight(tensor.n, tensor.k).double() * tensor.decode().std() / 3
    near = (tensor.decode() + noise).float()
    best = with_best_entries(near, tensor)
    for name, part in best.parts.items():
        if not name.startswith("codebook_"):
            assert torch.equal(part, tensor.parts[name]), name
    before, after = (distortion(near, one).relative_error for one in (tensor, best))
    assert after < before
    assert rounding_cost(near, tensor) == pytest.approx(before / after - 1)
    # and once they are the best, nothing is gained any more
    assert rounding_cost(near, best) == pytest.approx(0, abs=1e-5)


def test_exact_entries_cost_nothing() -> None:
    tensor: QuantizedTensor = random_tensor(
        CodebookSpec(vector_length=4, stages=(8,), codebook_dtype="int8"), 16, 16
    )
    assert rounding_cost(tensor.decode(), tensor) == 0
