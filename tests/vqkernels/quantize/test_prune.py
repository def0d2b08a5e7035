import dataclasses

import pytest
import torch

from vqkernels.errors import TensorError
from vqkernels.quantize import quantize, relative_error
from vqkernels.quantize.prune import prune
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import scaled_codebook


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4, "codebook_dtype": "float32"}
                        | fields)  # fmt: skip


def with_codes(tensor, codes, stage=0):
    """`tensor` with one stage's codes exchanged."""
    grid = tensor.parts["codes"].clone()
    grid[..., stage] = codes.to(grid.dtype).reshape(grid.shape[:2])
    return tensor.replace_parts(codes=grid)


def test_unused_entries_go_and_nothing_else_changes():
    tensor = quantize(normal(64, 48), make())
    # entries 3, 4 and 9 lose all they have
    codes = tensor.parts["codes"].long()
    for gone, other in ((3, 2), (4, 5), (9, 10)):
        codes[codes == gone] = other
    tensor = with_codes(tensor, codes)
    found = prune(tensor)
    found.validate()
    assert found.spec.stages == (13,)
    assert found.spec.code_bits == (4,)
    assert torch.equal(found.decode(), tensor.decode())
    assert found.bits.codebook == 13 * 4 * 32


def test_a_tensor_that_uses_all_it_has_stays():
    tensor = quantize(normal(64, 48), make(stages=(16, 8)))
    found = prune(tensor)
    assert found.spec == tensor.spec
    assert all(torch.equal(found.parts[name], part) for name, part in tensor.parts.items())


def test_codes_take_fewer_bits_and_bytes():
    tensor = quantize(normal(256, 64), make(stages=(300,)))
    codes = tensor.parts["codes"].long() % 17
    found = prune(with_codes(tensor, codes))
    assert found.spec.stages == (17,)
    assert found.spec.code_bits == (5,)
    assert found.parts["codes"].dtype == torch.uint8
    assert found.bits.index == 5 * codes.numel()


def test_users_of_rare_entries_get_the_nearest_left():
    tensor = quantize(normal(64, 48), make(stages=(32,)))
    book = tensor.parts["codebook_0"][0, 0].double()
    codes = tensor.parts["codes"].long().reshape(-1)
    uses = torch.bincount(codes, minlength=32)
    rare = int(uses.sort().values[5]) + 1
    found = prune(tensor, rare=rare)
    found.validate()
    left = (uses >= rare).nonzero()[:, 0]
    assert 20 < len(left) < 28
    assert found.spec.stages == (len(left),)
    assert torch.equal(found.parts["codebook_0"][0, 0], tensor.parts["codebook_0"][0, 0, left])
    expected = left[torch.cdist(book[codes], book[left]).argmin(1)]
    assert torch.equal(left[found.parts["codes"].long().reshape(-1)], expected)


def test_near_equal_entries_become_the_most_used():
    tensor = quantize(normal(64, 48), make())
    book = tensor.parts["codebook_0"].clone()
    book[0, 0, 7] = book[0, 0, 2] + 1e-3
    codes = tensor.parts["codes"].long().reshape(-1)
    codes[codes == 2] = torch.tensor([7, 7, 2]).repeat(1000)[: int((codes == 2).sum())]
    tensor = with_codes(tensor.replace_parts(codebook_0=book), codes)
    uses = torch.bincount(codes, minlength=16)
    stays, goes = (7, 2) if uses[7] > uses[2] else (2, 7)
    assert uses[goes] > 0
    assert prune(tensor, merge=1e-5).spec.stages == (16,)
    found = prune(tensor, merge=0.01)
    found.validate()
    assert found.spec.stages == (15,)
    left = torch.tensor([entry for entry in range(16) if entry != goes])
    assert torch.equal(found.parts["codebook_0"][0, 0], book[0, 0, left])
    assert (left[found.parts["codes"].long().reshape(-1)[codes == goes]] == stays).all()
    assert (found.decode() - tensor.decode()).abs().max() < 2e-3


def test_a_later_stage_makes_up_for_an_earlier_one():
    weight = normal(64, 64)
    tensor = quantize(weight, make(stages=(16, 16)))
    rare = int(torch.bincount(tensor.parts["codes"][..., 0].long().reshape(-1)).sort().values[7])
    first = prune(tensor, rare=rare)
    assert first.spec.stages[0] < 16
    best = prune(tensor, rare=rare, weight=weight)
    assert best.spec == first.spec
    # nearer to the weight where the weight is known, nearer to the decode where it is not
    assert relative_error(weight, best) < relative_error(weight, first)
    assert relative_error(tensor.decode(), first) < relative_error(tensor.decode(), best)


@pytest.mark.parametrize(
    "fields",
    [
        {"subspaces": 2, "method": "pq"},
        {"group_axis": "row", "group_size": 16},
        {"group_axis": "column", "group_size": 20, "vector_axis": "out"},
        {"codebook_dtype": "int8", "stages": (16, 8), "scale_axis": "row"},
        {"codebook_dtype": "float16", "vector_axis": "out", "stages": (16, 8)},
        {"vector_width": 2, "stride": 2},
        {"coefficients": (1.0, -0.5), "stages": (16, 8)},
        {"outlier_columns": 6, "uniform_columns": 4, "permuted": True, "zero_axis": "row"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(64, 60), (50, 42)])
def test_every_layout(fields, shape):
    weight = normal(*shape)
    tensor = quantize(weight, make(**fields))
    grid = tensor.parts["codes"].long()
    for number, entries in enumerate(tensor.spec.stages):
        grid[..., number] = grid[..., number] % (entries - 3)
    tensor = tensor.replace_parts(codes=grid.to(tensor.parts["codes"].dtype))
    found = prune(tensor)
    found.validate()
    assert found.spec.stages == tuple(entries - 3 for entries in tensor.spec.stages)
    assert torch.equal(found.decode(), tensor.decode())
    # one more entry goes: its users are off by no more than the farthest entry is
    fewer = prune(tensor, rare=12)
    fewer.validate()
    assert sum(fewer.spec.stages) <= sum(found.spec.stages)
    assert relative_error(tensor.decode(), fewer) < 0.5


def test_books_of_one_stage_keep_the_same_number():
    spec = make(group_axis="row", group_size=32)
    tensor = quantize(normal(64, 48), spec)
    codes = tensor.parts["codes"].long()[..., 0]
    codes[:32] = codes[:32] % 5
    codes[32:] = codes[32:] % 9
    tensor = with_codes(tensor, codes)
    found = prune(tensor)
    found.validate()
    assert found.spec.stages == (9,)
    assert found.parts["codebook_0"].shape == (2, 1, 9, 4)
    assert torch.equal(found.decode(), tensor.decode())


def test_one_entry_is_always_left():
    tensor = quantize(normal(16, 16), make(stages=(8, 4)))
    found = prune(tensor, rare=10**6)
    found.validate()
    assert found.spec.stages == (1, 1)
    most = tensor.parts["codes"][..., 0].long().reshape(-1).bincount().argmax()
    assert torch.equal(
        scaled_codebook(found.spec, found.parts, 0, torch.float32)[0, 0, 0],
        scaled_codebook(tensor.spec, tensor.parts, 0, torch.float32)[0, 0, most],
    )


def test_other_parts_and_other_bits_stay():
    spec = make(stages=(8, 8), code_bits=(5, 6), scale_axis="column")
    tensor = quantize(normal(32, 32), spec, bias=normal(32))
    codes = tensor.parts["codes"][..., 0].long() % 4
    found = prune(with_codes(tensor, codes))
    assert found.spec == dataclasses.replace(spec, stages=(4, 8), code_bits=(2, 6))
    for name in ("scale", "bias", "codebook_1"):
        assert torch.equal(found.parts[name], tensor.parts[name])


def test_the_number_of_threads_changes_no_bit(threads):
    tensor = quantize(normal(256, 256), make(stages=(64, 64)))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(prune(tensor, rare=230, merge=0.4))
    assert results[0].spec.stages == results[1].spec.stages != (64, 64)
    assert torch.equal(results[0].parts["codes"], results[1].parts["codes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rare": -1}, "rare -1"),
        ({"merge": -0.5}, "merge -0.5"),
        ({"merge": float("nan")}, "merge nan"),
        ({"weight": torch.zeros(8, 16)}, r"weight \[8, 16\]"),
        ({"weight": torch.full((16, 16), torch.nan)}, "finite"),
    ],
)
def test_bad_input_is_one_line(options, message):
    tensor = quantize(normal(16, 16), make(stages=(8,)))
    with pytest.raises(TensorError, match=message) as caught:
        prune(tensor, **options)
    assert "\n" not in str(caught.value)
