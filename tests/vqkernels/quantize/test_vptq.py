import itertools

import pytest
import torch

from tests.vqkernels.quantize.hessians import correlated, normal, output_error
from vqkernels.errors import UnsupportedError
from vqkernels.formats import open_source
from vqkernels.formats.vptq import dequantize, export
from vqkernels.quantize import Recipe, quantize
from vqkernels.quantize.vptq import outlier_codebook
from vqkernels.spec import CodebookSpec

PROPAGATED = Recipe(iterations=5, beam=2, refits=0)
PLAIN = Recipe(iterations=5, beam=2, refits=0, propagate=False)


def make(**fields):
    base = {"stages": (32, 8), "vector_length": 4, "vector_axis": "out", "method": "vptq"}
    return CodebookSpec(**base | fields)


def error_of(weight, spec, hessian, recipe):
    tensor = quantize(weight, spec, hessian=hessian, recipe=recipe)
    tensor.validate()
    return output_error(weight, tensor.decode(), hessian)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vector_axis": "in", "rotation_size": 5, "outlier_columns": 3, "permuted": True},
        {"vector_length": 5, "stride": 2, "subspaces": 2},
        {
            "outlier_columns": 3, "outlier_entries": 8, "outlier_vector_length": 2,
            "permuted": True, "group_axis": "column", "group_size": 14,
            "scale_axis": "column", "zero_axis": "column",
        },
    ],
)  # fmt: skip
def test_propagation_loses_less(fields):
    weight, hessian = normal(59, 43), correlated(43)
    plain, propagated, refitted = (
        error_of(weight, make(**fields), hessian, recipe)
        for recipe in (PLAIN, PROPAGATED, Recipe(iterations=5, refits=1))
    )
    assert propagated < 0.8 * plain
    assert refitted < propagated


def test_refits_move_the_codebooks():
    weight, hessian = normal(59, 43), correlated(43)
    before, after = (
        quantize(weight, make(), hessian=hessian, recipe=Recipe(iterations=5, beam=2, refits=count))
        for count in (0, 1)
    )
    moved = after.replace_parts(codes=before.parts["codes"])
    errors = [output_error(weight, found.decode(), hessian) for found in (before, moved)]
    assert errors[1] < errors[0]


@pytest.mark.sweep
def test_propagation_on_minilm(minilm_weight):
    weight, hessian = minilm_weight, correlated(384)
    spec = make(vector_length=8, stages=(256, 16))
    plain, propagated = (error_of(weight, spec, hessian, recipe) for recipe in (PLAIN, PROPAGATED))
    assert propagated < 0.45 * plain


def test_given_codebooks_get_propagated_codes():
    weight, hessian = normal(59, 43), correlated(43)
    tensor = quantize(weight, make(), hessian=hessian, recipe=PLAIN)
    books = [tensor.parts[f"codebook_{stage}"].float() for stage in range(2)]
    errors = [
        output_error(
            weight,
            quantize(weight, make(), hessian=hessian, recipe=recipe, codebooks=books).decode(),
            hessian,
        )
        for recipe in (PLAIN, PROPAGATED)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_without_a_full_hessian_errors_are_weighed():
    weight, diagonal = normal(60, 40), normal(40, seed=1).mul(1.5).exp()
    hessian = diagonal.diag()
    weighed = quantize(weight, make(), hessian=diagonal, recipe=PLAIN)
    plain = quantize(weight, make(), recipe=PLAIN)
    errors = [output_error(weight, tensor.decode(), hessian) for tensor in (weighed, plain)]
    assert errors[0] < 0.8 * errors[1]
    # nothing to make up for where inputs don't go together
    same = quantize(weight, make(), hessian=hessian, recipe=PROPAGATED)
    assert torch.equal(same.decode(), weighed.decode())


def test_what_it_makes_is_what_the_vptq_format_holds(tmp_path):
    weight, hessian = normal(22, 36), correlated(36)
    spec = make(group_axis="column", group_size=18, stages=(16, 8))
    tensor = quantize(weight, spec, hessian=hessian, recipe=PROPAGATED)
    export(tmp_path / "model", {"layer": tensor})
    found = open_source(tmp_path / "model")["layer"]
    assert torch.equal(found.decode(), tensor.decode())
    assert torch.equal(dequantize(tensor).double(), dequantize(found).double())


def test_the_number_of_threads_changes_no_bit(threads):
    weight, hessian, found = normal(400, 40), correlated(40), []
    for count in (1, 2):
        torch.set_num_threads(count)
        recipe = Recipe(iterations=3, refits=1)
        found.append(quantize(weight, make(), hessian=hessian, recipe=recipe).parts)
    for name, part in found[0].items():
        assert torch.equal(part, found[1][name]), name


# ------------------------------------------------------------------------------------------------
# outlier columns


def outliers(**fields):
    return make(outlier_columns=3, outlier_entries=2, outlier_vector_length=2, **fields)


def test_the_outliers_codebook_is_the_best_there_is():
    columns, weights = normal(4, 3), normal(4, 3, seed=2).exp()
    # vectors run along output features: rows 0 and 1 of a column, then rows 2 and 3
    points = columns.reshape(2, 2, 3).transpose(1, 2).reshape(6, 2)
    mass = weights.reshape(2, 2, 3).transpose(1, 2).reshape(6, 2)
    ours = []
    for seed in range(6):  # k-means ends in a local optimum from some
        codes, book = outlier_codebook(columns, outliers(), Recipe(), weights=weights, seed=seed)
        assert codes.shape == (2, 3) and codes.dtype == torch.uint8
        assert book.shape == (2, 2) and book.dtype == torch.float16
        lost = points - book.float()[codes.flatten().long()]
        ours.append(float((mass * lost.square()).sum()))
    best = min(
        sum(
            (mass[part] * (points[part] - (mass[part] * points[part]).sum(0) / mass[part].sum(0))
             .square()).sum()
            for part in (torch.tensor(split) == 0, torch.tensor(split) == 1)
        )
        for split in itertools.product((0, 1), repeat=6)
        if 0 < sum(split) < 6
    )  # fmt: skip
    assert min(ours) == pytest.approx(float(best), rel=1e-3)


def test_outliers_that_end_inside_a_vector():
    columns = normal(5, 3)
    codes, book = outlier_codebook(columns, make(
        outlier_columns=3, outlier_entries=9, outlier_vector_length=2, side_dtype="float32",
    ), Recipe(iterations=3), weights=None, seed=0)  # fmt: skip
    decoded = book[codes.long()].transpose(1, 2).reshape(6, 3)[:5]
    torch.testing.assert_close(decoded, columns)


def test_outliers_beyond_the_side_dtype_are_refused():
    with pytest.raises(UnsupportedError, match="float16 can't hold"):
        outlier_codebook(normal(8, 3) * 1e6, outliers(), Recipe(), weights=None, seed=0)
