import pytest
import torch

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec


def make(**fields):
    return CodebookSpec(**{"stages": (16,), "vector_length": 4} | fields)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(64), {}, r"weight: torch.float32 \[64\]"),
        (torch.zeros(2, 64, 8), {}, r"\[2, 64, 8\]"),
        (torch.zeros(64, 64, dtype=torch.int32), {}, "torch.int32"),
        (torch.full((64, 64), torch.nan), {}, "weight: holds NaN"),
        (torch.full((64, 64), 1e300, dtype=torch.float64), {}, "weight: holds NaN or infinity"),
        (torch.zeros(64, 64), {"weights": torch.ones(63)}, r"weights: shape \[63\]"),
        (torch.zeros(64, 64), {"weights": -torch.ones(64)}, "weights: must be"),
        (torch.zeros(64, 64), {"weights": torch.full((64,), torch.nan)}, "weights: must be"),
        (torch.zeros(64, 64), {"hessian": torch.ones(63)}, r"hessian: shape \[63\]"),
        (torch.zeros(64, 64), {"hessian": torch.full((64, 64), torch.inf)}, "hessian: holds NaN"),
        (torch.zeros(64, 64), {"hessian": torch.ones(64, 64).triu()}, "hessian: is not symmetric"),
        (torch.zeros(64, 64), {"hessian": -torch.eye(64)}, "weights: must be"),
        (
            torch.zeros(64, 64),
            {"hessian": torch.eye(64), "weights": torch.ones(64)},
            "weights and hessian both",
        ),
        (torch.zeros(64, 64), {"bias": torch.zeros(63)}, "bias"),
        (torch.zeros(64, 64), {"bias": torch.full((64,), torch.inf)}, "bias"),
    ],
)
def test_bad_input_is_one_line(weight, options, message):
    with pytest.raises(TensorError, match=message) as caught:
        quantize(weight, make(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": (4096,)}, "4,096 entries for 1,024 vectors"),
        ({"coefficients": (0.0,)}, "a stage's coefficient is 0; leave that stage out"),
        ({"rotation_size": 24}, "a rotation of 24 doesn't divide 64 columns"),
        ({"outlier_columns": 40, "uniform_columns": 24}, "64 outlier and uniform columns leave"),
    ],
)
def test_a_layer_that_cannot_hold_the_format_is_refused(fields, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        quantize(torch.ones(64, 64), make(**fields))
    assert "\n" not in str(caught.value)


BOOK = torch.ones(1, 1, 16, 4)


@pytest.mark.parametrize(
    ("codebooks", "message"),
    [
        ([], "codebooks: 0 given, but the format has 1 stages"),
        ([BOOK, BOOK], "codebooks: 2 given"),
        ([BOOK[0]], r"stage 0 is \[1, 16, 4\], but the format of this 64 x 64 layer needs"),
        ([BOOK / 0], "stage 0 holds NaN or infinity"),
    ],
)
def test_codebooks_that_are_not_the_formats_are_refused(codebooks, message):
    with pytest.raises(TensorError, match=message) as caught:
        quantize(torch.ones(64, 64), make(), codebooks=codebooks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields", [{"codebook_dtype": "float16"}, {"scale_axis": "row", "side_dtype": "float16"}]
)
def test_values_beyond_float16_are_refused(fields):
    with pytest.raises(UnsupportedError, match="float16 can't hold") as caught:
        quantize(torch.ones(64, 64) * 1e6, make(**fields))
    assert "\n" not in str(caught.value)
