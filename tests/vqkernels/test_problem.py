import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import fitting_specs
from vqkernels.parts import effective_bits
from vqkernels.presets import parse_format
from vqkernels.problem import Problem

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def make(**fields) -> Problem:
    return Problem(**{"m": 3, "n": 64, "k": 128, "spec": parse_format("vq-256x8")} | fields)


@pytest.mark.parametrize(("dtype", "size"), SIZES.items())
def test_floors_of_a_known_problem(dtype, size):
    problem = make(dtype=dtype)
    assert problem.torch_dtype == getattr(torch, dtype)
    assert problem.flops == 2 * 3 * 64 * 128
    assert problem.weight_bytes == 64 * 128 // 8 + 256 * 8 * 2  # codes and fp16 codebook
    assert problem.activation_bytes == (3 * 128 + 3 * 64) * size
    assert problem.bytes == problem.weight_bytes + problem.activation_bytes


@pytest.mark.parametrize("dtype", SIZES)
def test_a_bias_is_read_once(dtype):
    plain, biased = make(dtype=dtype), make(dtype=dtype, bias=True)
    assert biased.bytes - plain.bytes == 64 * SIZES[dtype]


def test_codes_of_part_of_a_byte_are_counted_in_bits():
    toy = Problem(m=1, n=16, k=16, spec=parse_format("toy-16-4"))
    # 32 vectors of 4 + 2 bits, (16 + 4) entries of 8 in fp16
    assert toy.weight_bytes == 32 * 6 // 8 + 20 * 8 * 2


@given(fitting_specs(), st.integers(1, 9), st.sampled_from(sorted(SIZES)), st.booleans())
def test_floors_of_any_problem(fitting, m, dtype, bias):
    spec, n, k = fitting
    problem = Problem(m=m, n=n, k=k, spec=spec, dtype=dtype, bias=bias)
    bits = effective_bits([(spec, n, k)])
    assert problem.flops == 2 * m * n * k
    assert 0 <= 8 * problem.weight_bytes - (bits.index + bits.codebook + bits.side) < 8
    assert problem.activation_bytes == (m * k + m * n + bias * n) * SIZES[dtype]


def test_a_problem_is_a_value():
    assert make() == make()
    assert len({make(), make(), make(m=4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().m = 4
