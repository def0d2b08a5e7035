"""VQ: weights count, and so does the recipe."""

import pytest
import torch

from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (256,), "vector_length": 8, "codebook_dtype": "float32"}
                        | fields)  # fmt: skip


def test_a_hessian_diagonal_lowers_the_weighted_error_by_a_quarter(minilm_weight):
    # measured: 32, 29 and 29 % lower with the seeds 0, 1 and 2 of a lognormal diagonal
    weight = minilm_weight
    hessian = normal(weight.shape[1]).exp()

    def weighted(tensor):
        return float(((weight - tensor.decode()).square() * hessian).sum())

    plain, aware = quantize(weight, make()), quantize(weight, make(), hessian=hessian)
    assert weighted(aware) < 0.75 * weighted(plain)
    assert relative_error(weight, aware) > relative_error(weight, plain)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(clustering="minibatch", batch=512),
        Recipe(clustering="medians"),
        Recipe(clustering="medoids"),
        Recipe(init="random", merge=0.2, norm_limit=1.5),
        Recipe(sample=1024),
    ],
    ids=lambda recipe: str(recipe.to_dict()),
)
def test_a_recipe_changes_how_entries_are_found(recipe):
    weight, spec = normal(128, 128), make(stages=(64,))
    tensor = quantize(weight, spec, recipe=recipe)
    tensor.validate()
    plain = quantize(weight, spec)
    assert not torch.equal(tensor.parts["codebook_0"], plain.parts["codebook_0"])
    assert relative_error(weight, tensor) < 1.25 * relative_error(weight, plain)


def test_cosine_codes_are_those_of_the_stored_entries():
    weight = normal(64, 64) * normal(64, 8, seed=1).exp().repeat_interleave(8, dim=1)
    spec = make(stages=(32,), distance="cosine", codebook_dtype="float16")
    tensor = quantize(weight, spec)
    tensor.validate()
    cells, book = weight.reshape(-1, 8).double(), tensor.parts["codebook_0"][0, 0].double()
    cosines = (cells / cells.norm(dim=1, keepdim=True)) @ (book / book.norm(dim=1, keepdim=True)).T
    assert torch.equal(tensor.parts["codes"].reshape(-1).long(), cosines.argmax(1))

    def mean_cosine(tensor):
        return float(torch.cosine_similarity(cells, tensor.decode().reshape(-1, 8), dim=1).mean())

    assert mean_cosine(tensor) > 0.01 + mean_cosine(quantize(weight, make(stages=(32,))))
