"""Any format that decode understands is found for any weight, and coding it again gives it back."""

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from vqkernels.errors import SpecError
from vqkernels.parts import check_fit
from vqkernels.quantize import Recipe, encode, quantize, relative_error
from vqkernels.spec import CodebookSpec

N, K = 24, 26

AXES = st.sampled_from(["none", "tensor", "row", "column"])
SIDES = st.sampled_from(
    [
        {},
        {"outlier_columns": 2},
        {"outlier_columns": 2, "outlier_entries": 3, "outlier_vector_length": 5},
        {"uniform_columns": 2, "uniform_bits": 3},
        {"outlier_columns": 3, "uniform_columns": 3, "permuted": True},
        {"outlier_columns": 1, "outlier_entries": 4, "outlier_vector_length": 2,
         "uniform_columns": 1, "uniform_bits": 1, "permuted": True},
        {"permuted": True},
    ]
)  # fmt: skip
GROUPS = st.sampled_from(
    [{}, {"group_axis": "row", "group_size": 8}, {"group_axis": "column", "group_size": 8}]
)

SPECS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["vq", "pq", "opq", "rq", "additive", "vptq"]),
        "stages": st.sampled_from([(6,), (1,), (4, 3), (3, 3, 2)]),
        "vector_length": st.sampled_from([1, 2, 4]),
        "vector_axis": st.sampled_from(["in", "out"]),
        "vector_width": st.sampled_from([1, 1, 2]),
        "subspaces": st.sampled_from([1, 1, 2]),
        "stride": st.sampled_from([1, 1, 2]),
        "codebook_dtype": st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
        "side_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "distance": st.sampled_from(["l2", "l2", "l2", "cosine"]),
        "scale_axis": AXES,
        "zero_axis": AXES,
        "rotation": st.booleans(),
        "coefficients": st.booleans(),
        "sides": SIDES,
        "groups": GROUPS,
    }
)
RECIPES = st.builds(
    Recipe,
    iterations=st.just(3),
    refits=st.sampled_from([0, 2]),
    beam=st.sampled_from([1, 4]),
    scaling=st.sampled_from(["rms", "std", "l2", "max"]),
    rotation=st.sampled_from(["auto", "learned", "hadamard", "random", "whitening"]),
    sides=st.sampled_from(["auto", "hessian", "magnitude", "error"]),
    clip=st.sampled_from([0.0, 0.0, 2.0]),
)


def spec_of(fields):
    fields = dict(fields)
    groups, sides = fields.pop("groups"), fields.pop("sides")
    main = K - sides.get("outlier_columns", 0) - sides.get("uniform_columns", 0)
    rotated, factors = fields.pop("rotation"), fields.pop("coefficients")
    # all main columns, or half of them
    fields["rotation_size"] = rotated * (main // 2 if main % 4 == 0 else main)
    fields["coefficients"] = (0.5, 2.0, -1.0)[: len(fields["stages"])] if factors else ()
    return CodebookSpec(**fields, **groups, **sides)


def drawn(fields):
    try:
        spec = spec_of(fields)
        check_fit(spec, N, K)
    except SpecError:
        reject()
    return spec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_format(examples):
    return lambda test: settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )(
        given(fields=SPECS, recipe=RECIPES, counted=st.sampled_from(["", "weights", "hessian"]))(
            test
        )
    )


def check(fields, recipe, counted):
    spec = drawn(fields)
    if spec.distance == "cosine" and counted == "hessian":
        reject()  # a cosine is no error of the layer's output
    inputs = normal(64, K, seed=5)
    options = {
        "": {},
        "weights": {"weights": inputs.square().mean(0)},
        "hessian": {"hessian": inputs.T @ inputs},
    }[counted]
    weight = normal(N, K, seed=3) * torch.logspace(-1, 0.5, K) + 0.3
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(quantize(weight, spec, recipe=recipe, seed=2, **options))
    tensor = found[0]
    tensor.validate()
    for name, part in tensor.parts.items():
        assert torch.equal(part.float(), found[1].parts[name].float()), name
    if spec.distance == "l2" and spec.max_entries > 1:
        assert relative_error(weight, tensor) < 1.2
    # its own decode is in the format already
    decoded = tensor.decode()
    again = encode(decoded, tensor)
    again.validate()
    if len(spec.stages) == 1 and spec.distance == "l2":
        lost = (again.decode() - decoded).abs().max()
        assert float(lost) <= 1e-3 * float(decoded.abs().max())


@any_format(16)
def test_any_format(threads, fields, recipe, counted):
    check(fields, recipe, counted)


@pytest.mark.sweep
@any_format(400)
def test_any_format_at_length(threads, fields, recipe, counted):
    check(fields, recipe, counted)
