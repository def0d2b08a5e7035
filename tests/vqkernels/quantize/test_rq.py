import pytest
import torch

from vqkernels.quantize import Recipe, quantize, relative_error, rq
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import scaled_codebook


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (32, 32), "vector_length": 4, "codebook_dtype": "float32",
                           "method": "rq"} | fields)  # fmt: skip


def error_of(weight, spec, **options):
    tensor = quantize(weight, spec, **options)
    tensor.validate()
    return relative_error(weight, tensor)


def books_of(tensor):
    return [
        scaled_codebook(tensor.spec, tensor.parts, stage, torch.float64)[0, 0]
        for stage in range(len(tensor.spec.stages))
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_codes_are_the_best_sums_of_stored_entries(dtype):
    weight = normal(32, 64)
    recipe = Recipe(iterations=4, beam=32, refits=2)
    tensor = quantize(weight, make(codebook_dtype=dtype), recipe=recipe)
    first, second = books_of(tensor)
    sums = (first[:, None] + second).reshape(-1, 4)
    best = torch.cdist(weight.double().reshape(-1, 4), sums).square().amin(1).sum()
    lost = (weight - tensor.decode()).square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-5)


def test_beam_and_refits_each_gain():
    weight = normal(128, 128)
    greedy, beam, once, often = (
        error_of(weight, make(), recipe=Recipe(beam=width, refits=refits))
        for width, refits in ((1, 0), (8, 0), (8, 1), (8, 6))
    )
    assert beam < 0.95 * greedy
    assert once < 0.985 * beam
    assert often < 0.985 * once


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_later_stages_make_up_for_rounding(dtype):
    weight = normal(128, 64)
    exact, stored = (error_of(weight, make(codebook_dtype=d)) for d in ("float32", dtype))
    assert stored < 1.005 * exact


def test_weights_of_coordinates_lower_their_own_error():
    weight, importance = normal(128, 64), normal(64, seed=1).mul(2).exp()

    def lost(weights):
        tensor = quantize(weight, make(), weights=weights)
        return float(((weight - tensor.decode()).square() * importance).sum())

    assert lost(importance) < 0.5 * lost(None)


def test_no_entry_is_left_unused():
    # few distinct vectors: k-means leaves entries of the second stage with nothing to do
    weight = normal(40, 4).repeat(20, 1) + normal(800, 4, seed=1) / 100
    tensor = quantize(weight, make(stages=(16, 16)))
    for stage in range(2):
        assert len(tensor.parts["codes"][..., stage].unique()) == 16


def test_a_sample_trains_and_all_are_coded():
    weight = normal(256, 128)
    few = quantize(weight, make(), recipe=Recipe(sample=2048))
    few.validate()
    assert relative_error(weight, few) < 1.1 * error_of(weight, make())
    first, second = books_of(few)
    sums = (first[:, None] + second).reshape(-1, 4)
    best = torch.cdist(weight.double().reshape(-1, 4), sums).square().amin(1).sum()
    assert float((weight - few.decode()).square().sum()) < 1.01 * float(best)


@pytest.mark.parametrize("changes", [{"clustering": "medoids"}, {"norm_limit": 1.0}])
def test_entries_that_are_not_means_are_not_refitted(changes, monkeypatch):
    monkeypatch.setattr(rq, "refit", None)
    assert error_of(normal(32, 64), make(), recipe=Recipe(iterations=4, **changes)) < 0.5


def test_refits_never_lose():
    # 24 vectors, 24 entries: least squares after a beam of 1 ends at 0.025, greedy at 0.015
    weight = normal(6, 16, seed=4)
    greedy, together = (
        error_of(weight, make(stages=(8, 8, 8)), recipe=Recipe(iterations=4, beam=1, refits=refits))
        for refits in (0, 3)
    )
    assert together <= greedy * 1.0001


@pytest.mark.parametrize(
    "fields", [{"stages": (32, 16, 8)}, {"codebook_dtype": "int8"}, {"subspaces": 2}]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_same_bits_on_any_number_of_threads(threads, fields, weighted):
    weight, importance = normal(128, 128), normal(128, seed=1).exp() if weighted else None
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        recipe = Recipe(iterations=4, beam=4, refits=2)
        found.append(quantize(weight, make(**fields), weights=importance, recipe=recipe).parts)
    for name, part in found[0].items():
        assert torch.equal(part, found[1][name]), name
