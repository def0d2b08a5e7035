import pytest
import torch

from vqkernels.parts import codebook_sets
from vqkernels.quantize import beam, quantize, rq
from vqkernels.quantize.layout import join, split
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.quantize.tune import error, tune
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, decode_main


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(
        **{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32"} | fields
    )


def correlated(k, seed=1):
    """A Hessian of inputs with few directions that matter."""
    inputs = normal(4 * k, k, seed=seed) @ (normal(k, k, seed=seed + 1) / torch.arange(1, k + 1))
    return inputs.T @ inputs / len(inputs)


def started(target, spec):
    stages = rq.fit(target, spec, Recipe(iterations=5, beam=1, refits=0), seed=0)
    return [stage.entries for stage in stages], [stage.codes for stage in stages]


def lost(target, spec, entries, codes):
    """The error of Target's definition, from float64 and the tensor's own decode."""
    n, k = target.matrix.shape
    shape = (codebook_sets(spec, n, k), spec.subspaces)
    cells = split(spec, target.matrix, None).cells
    parts = {f"codebook_{s}": book.unflatten(0, shape) for s, book in enumerate(entries)}
    parts["codes"] = join(spec, n, k, cells, codes)
    QuantizedTensor(spec, n, k, parts).validate()
    e = decode_main(spec, n, k, parts, torch.float64) - target.matrix
    if target.hessian is not None:
        rows = torch.ones(n) if target.rows is None else target.rows
        return sum(
            float(w * (row @ target.hessian.double() @ row)) for w, row in zip(rows, e, strict=True)
        )
    weights = torch.ones(n, k) if target.weights is None else target.weights
    return float((weights * e.square()).sum())


TARGETS = {
    "plain": lambda w: Target(w),
    "weights": lambda w: Target(w, weights=torch.exp(normal(*w.shape, seed=9))),
    "hessian": lambda w: Target(
        w, weights=correlated(w.shape[1]).diagonal().expand_as(w), hessian=correlated(w.shape[1])
    ),
    "rows": lambda w: Target(
        w, hessian=correlated(w.shape[1]), rows=torch.exp(normal(len(w), seed=8))
    ),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_error_is_the_targets(kind):
    weight = normal(12, 16)
    target, spec = TARGETS[kind](weight), make()
    entries, codes = started(target, spec)
    decoded = entries[0][0][codes[0][0]].reshape(12, 16)
    expected = lost(target, spec, entries, codes)
    assert float(error(target, decoded - weight)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stages": (16, 8), "method": "rq"},
        {"vector_axis": "out", "group_axis": "column", "group_size": 20},
        {"subspaces": 2, "stride": 2, "group_axis": "row", "group_size": 24},
        {"vector_width": 2},
    ],
    ids=["vq", "rq", "out", "strided", "wide"],
)
def test_the_error_never_rises(fields, kind):
    weight = normal(45, 39)  # ends inside a vector, either way
    target, spec = TARGETS[kind](weight), make(**fields)
    entries, codes = started(target, spec)
    before = lost(target, spec, entries, codes)
    assert tune(target, spec, entries, codes, Recipe())[0][0].equal(entries[0])  # no steps
    tuned = tune(target, spec, entries, codes, Recipe(tune=15))
    assert lost(target, spec, *tuned) <= before * (1 + 1e-6)


def test_what_was_best_on_the_way_is_kept():
    # steps as large as the values: the last one ends far off
    target, spec = Target(normal(48, 32)), make()
    entries, codes = started(target, spec)
    before = lost(target, spec, entries, codes)
    tuned = tune(target, spec, entries, codes, Recipe(tune=3, rate=10.0))
    assert lost(target, spec, *tuned) <= before * (1 + 1e-6)


def test_codes_learn_what_the_outputs_need():
    # 0.51 of the error that nearest codes leave
    weight = normal(64, 64)
    target, spec = TARGETS["hessian"](weight), make()
    entries, codes = started(target, spec)
    before = lost(target, spec, entries, codes)
    tuned = tune(target, spec, entries, codes, Recipe(tune=100))
    assert lost(target, spec, *tuned) < 0.6 * before
    assert not torch.equal(
        tuned[1][0],
        beam.encode(
            target.vectors(spec).points, tuned[0], weights=target.vectors(spec).weights, beam=1
        )[0],
    )


def test_entries_of_fixed_codes_reach_least_squares():
    # four vectors, each with an entry of its own: nothing else is best
    weight = normal(4, 4)
    target, spec = Target(weight), make(stages=(4,))
    entries, codes = [normal(1, 4, 4, seed=1) / 100 + weight[None]], [torch.arange(4)[None]]
    tuned, found = tune(target, spec, entries, codes, Recipe(tune=300, rate=0.02))
    assert torch.equal(found[0], codes[0])
    torch.testing.assert_close(tuned[0][0], weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "rows"])
def test_same_bits_on_any_number_of_threads(kind):
    weight = normal(128, 96)
    target, spec = TARGETS[kind](weight), make(stages=(16, 16))
    entries, codes = started(target, spec)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(tune(target, spec, entries, codes, Recipe(tune=10)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_tuned_tensor_loses_less_of_the_outputs(dtype):
    weight, hessian = normal(64, 64), correlated(64)
    spec = make(stages=(16, 16), codebook_dtype=dtype, method="rq", coefficients=(1.0, 0.5))
    lost = {}
    for steps in (0, 60):
        tensor = quantize(weight, spec, hessian=hessian, recipe=Recipe(tune=steps, refits=2))
        tensor.validate()
        e = tensor.decode() - weight
        lost[steps] = float(((e @ hessian.double()) * e).sum())
    assert lost[60] < 0.7 * lost[0]
