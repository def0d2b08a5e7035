"""Use of codebook entries, against scipy's entropy and numpy's counts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from vqkernels.quality import SHARE_EDGES, usage
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor, set_index


def skewed(tensor: QuantizedTensor) -> QuantizedTensor:
    """Its codes squared, so that low ones are much more frequent."""
    stages = tensor.spec.stages
    codes = tensor.parts["codes"].long()
    for stage, entries in enumerate(stages):
        codes[..., stage] = codes[..., stage] ** 2 // entries
    return tensor.replace_parts(codes=codes.to(tensor.parts["codes"].dtype))


@pytest.mark.parametrize(
    "spec",
    [
        CodebookSpec(vector_length=2, stages=(16, 8), method="rq"),
        CodebookSpec(vector_length=2, stages=(8,), subspaces=2, method="pq"),
        CodebookSpec(vector_length=2, stages=(8, 4), group_axis="row", group_size=8),
        CodebookSpec(vector_length=2, stages=(300,)),
    ],
)
def test_is_what_scipy_and_numpy_find(spec: CodebookSpec) -> None:
    tensor = skewed(random_tensor(spec, 20, 40, fit=False))
    rows, columns, _ = tensor.parts["codes"].shape
    books = set_index(spec, 20, 40).expand(rows, columns).numpy()
    for stage, found in enumerate(usage(tensor)):
        codes = tensor.parts["codes"][..., stage].to(torch.int64).numpy()
        entries = spec.stages[stage]
        counts = [
            np.bincount(codes[books == book], minlength=entries) for book in range(books.max() + 1)
        ]
        bits = [entropy(count, base=2) for count in counts]
        expected = np.average(bits, weights=[count.sum() for count in counts])
        assert found.entropy_bits == pytest.approx(expected, rel=1e-12)
        assert found.perplexity == pytest.approx(2**expected)
        assert (found.stage, found.even_bits) == (str(stage), math.log2(entries))
        assert found.code_bits == spec.code_bits[stage]
        assert found.entries == entries * len(counts)
        assert found.used == sum(np.count_nonzero(count) for count in counts)
        assert found.dead == found.entries - found.used > 0
        assert found.top_share == pytest.approx(max((c / c.sum()).max() for c in counts))
        relative = np.concatenate([count / count.sum() * entries for count in counts])
        edges = [-1, *SHARE_EDGES, np.inf]
        assert found.histogram == tuple(
            int(((relative > low) & (relative <= high)).sum())
            for low, high in itertools.pairwise(edges)
        )


def test_even_use_and_one_entry_alone() -> None:
    spec = CodebookSpec(vector_length=4, stages=(16, 16, 1))
    tensor = random_tensor(spec, 16, 16, fit=False)
    codes = tensor.parts["codes"].clone()
    codes[..., 0] = torch.arange(64).reshape(16, 4) % 16
    codes[..., 1] = 3
    even, alone, only = usage(tensor.replace_parts(codes=codes))
    assert (even.entropy_bits, even.perplexity, even.dead, even.top_share) == (4, 16, 0, 1 / 16)
    assert even.histogram == (0, 0, 0, 0, 16, 0, 0, 0, 0)
    assert (alone.entropy_bits, alone.perplexity, alone.dead, alone.top_share) == (0, 1, 15, 1)
    assert math.copysign(1, alone.entropy_bits) == 1
    assert alone.histogram == (15, 0, 0, 0, 0, 0, 0, 0, 1)
    assert (only.even_bits, only.entropy_bits, only.code_bits) == (0, 0, 1)


def test_counts_the_codebook_of_outliers_too() -> None:
    spec = CodebookSpec(
        vector_length=4,
        stages=(8,),
        outlier_columns=2,
        outlier_entries=6,
        outlier_vector_length=2,
    )
    tensor = random_tensor(spec, 16, 18, fit=False)
    codes = torch.zeros_like(tensor.parts["outlier_codes"])
    codes[0, 0] = 4
    _, found = usage(tensor.replace_parts(outlier_codes=codes))
    assert (found.stage, found.entries, found.used, found.code_bits) == ("outliers", 6, 2, 3)
    assert found.entropy_bits == pytest.approx(entropy([15, 1], base=2))
