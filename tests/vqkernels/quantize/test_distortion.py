"""The distortions that faiss 1.15.1 reaches in 25 iterations, to within 0.3 % or better.

`default` is the default recipe, held to faiss's best: a beam of 32 with its codebooks refitted.
"""

import statistics

import click
import pytest

from vqkernels.quantize import Recipe, quantize, relative_error
from vqkernels.spec import CodebookSpec

VQ = {"stages": (256,), "vector_length": 8}
PQ = {"stages": (256,), "vector_length": 4, "subspaces": 2, "method": "pq"}
OPQ = {**PQ, "method": "opq", "rotation_size": 8, "side_dtype": "float32"}
RQ = {"stages": (256, 256), "vector_length": 8, "method": "rq"}

GREEDY = Recipe(beam=1, refits=0)
BEAM = Recipe(beam=5, refits=0)
REFIT = Recipe(beam=5, refits=2)
WIDE = Recipe(beam=32, refits=2)

CASES = {"vq": (VQ, GREEDY), "pq": (PQ, GREEDY), "rq": (RQ, GREEDY), "beam": (RQ, BEAM),
         "refit": (RQ, REFIT), "wide": (RQ, WIDE), "opq": (OPQ, GREEDY),
         "default": (RQ, Recipe())}  # fmt: skip
MINILM = {"vq": 0.33422, "pq": 0.10604, "rq": 0.11746, "beam": 0.10690, "refit": 0.10254,
          "wide": 0.09902, "opq": 0.10589, "default": 0.09902}  # fmt: skip
NORMAL = {"vq": 0.31302, "pq": 0.09472, "rq": 0.10189, "beam": 0.09400, "refit": 0.08984,
          "wide": 0.08801, "opq": 0.09473, "default": 0.08801}  # fmt: skip


def error_of(weight, fields, **options):
    tensor = quantize(weight, CodebookSpec(**fields, codebook_dtype="float32"), **options)
    tensor.validate()
    used = [len(codes.unique()) for codes in tensor.parts["codes"].flatten(0, 1).T]
    assert used == list(tensor.spec.stages)  # no entry is dead
    return relative_error(weight, tensor)


@pytest.mark.parametrize("name", ["vq", "pq", "rq"])
def test_error_on_minilm(minilm_weight, name):
    fields, recipe = CASES[name]
    assert error_of(minilm_weight, fields, recipe=recipe) <= 1.003 * MINILM[name]


@pytest.mark.parametrize("name", ["vq", "refit"])
def test_error_on_normal_numbers(normal_weight, name):
    fields, recipe = CASES[name]
    assert error_of(normal_weight, fields, recipe=recipe) <= 1.003 * NORMAL[name]


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("matrix", ["minilm", "normal"])
def test_the_median_of_five_seeds(minilm_weight, normal_weight, matrix, name, capsys):
    weight = minilm_weight if matrix == "minilm" else normal_weight
    fields, recipe = CASES[name]
    errors = [error_of(weight, fields, recipe=recipe, seed=seed) for seed in range(5)]
    table = (MINILM if matrix == "minilm" else NORMAL)[name]
    median = statistics.median(errors)
    with capsys.disabled():
        click.echo(
            f"\n{matrix} {name}: {median:.5f} ({min(errors):.5f} to {max(errors):.5f}), {table}"
        )
    assert median <= 1.003 * table


def test_row_scales_gain_a_tenth_at_2_bits(minilm_weight):
    weight = minilm_weight[:384]
    plain, scaled = (
        error_of(weight, {**RQ, "scale_axis": axis}, recipe=GREEDY) for axis in ("none", "row")
    )
    assert scaled < 0.9 * plain
