"""How often each entry is used, as a container stores it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.strategies import quantized_tensors
from tests.vqkernels.container.crafted import Tensors, parts_of, rebuild, refused
from vqkernels import container
from vqkernels.errors import ContainerError
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(vector_length=2, stages=(5, 300), subspaces=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    container.save(path, {"layer": random_tensor(SPEC, 40, 80)})
    return path


@settings(max_examples=30)
@given(quantized_tensors(max_side=12))
def test_it_counts_the_codes_of_all_codebooks(tensor: QuantizedTensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        container.save(path, {"layer": tensor})
        found = container.open_container(path).usage("layer")
    assert list(found) == list(range(len(tensor.spec.stages)))
    for stage, counts in found.items():
        codes = tensor.parts["codes"][..., stage].flatten().tolist()
        expected = [codes.count(entry) for entry in range(tensor.spec.stages[stage])]
        assert counts.tolist() == expected


@pytest.mark.parametrize(
    ("cells", "dtype"),
    [(255, torch.uint8), (256, torch.uint16), (65535, torch.uint16), (65536, torch.uint32)],
)
def test_it_takes_no_more_than_its_largest_count_needs(
    cells: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = random_tensor(CodebookSpec(vector_length=1, stages=(3,)), 1, cells)
    equal = tensor.replace_parts(codes=torch.full_like(tensor.parts["codes"], 2))
    container.save(tmp_path / "x", {"layer": equal})
    stored = parts_of(tmp_path / "x")["layer/usage_0"]
    assert (stored.dtype, stored.tolist()) == (dtype, [0, 0, cells])
    container.load(tmp_path / "x", decoded=True)


def test_it_can_be_left_out(path: Path) -> None:
    source = container.open_container(path)
    container.save(path, {"layer": source["layer"]}, usage=False)
    source = container.open_container(path)
    assert not source.outline("layer").usage
    assert not any("usage" in key for key in parts_of(path))
    assert source.usage("layer") == {}
    source.verify("layer")


def test_it_costs_no_effective_bits(path: Path) -> None:
    tensor = random_tensor(SPEC, 40, 80)
    entry = container.describe(path).tensors[0]
    assert entry.bits == tensor.bits
    assert entry.stored_bytes == sum(value.nbytes for value in parts_of(path).values())


def change(part: str, apply: Any) -> Any:
    def changed(_: object, tensors: Tensors) -> None:
        tensors[f"layer/{part}"] = torch.from_numpy(apply(tensors[f"layer/{part}"].numpy().copy()))

    return changed


def shift(counts: Any) -> Any:
    """One code more of entry 0, one less of entry 1."""
    counts[0] += 1
    counts[1] -= 1
    return counts


WRONG = {
    "sum": (lambda counts: counts + counts.dtype.type(1), r"usage_0 counts 1,605 codes, .* 1,600;"),
    "width": (lambda counts: counts.astype("u4"), "usage_0 is wider than its largest count needs"),
    "dtype": (
        lambda counts: counts.astype("i4"),
        r"usage_0 is I32 .* needs U8 or U16 or U32 \[5\]",
    ),
    "rank": (lambda counts: counts.reshape(5, 1), r"usage_0 is U16 \[5, 1\], but the format needs"),
    "shape": (lambda counts: counts[:4], r"usage_0 is U16 \[4\], but the format needs .* \[5\]"),
}


@pytest.mark.parametrize(("apply", "says"), WRONG.values(), ids=WRONG)
def test_usage_that_can_not_be(apply: Any, says: str, path: Path) -> None:
    rebuild(path, change("usage_0", apply))
    refused(path, ContainerError, f"tensor 'layer': {says}")


@pytest.mark.parametrize("stage", [0, 1])
def test_each_count_is_compared_on_request(stage: int, path: Path) -> None:
    rebuild(path, change(f"usage_{stage}", shift))
    container.load(path)
    refused(path, ContainerError, f"tensor 'layer': usage_{stage} is not of its", decoded=True)


def test_damaged_usage(path: Path) -> None:
    content, stored = bytearray(path.read_bytes()), parts_of(path)["layer/usage_1"]
    content[content.index(stored.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    says = "tensor 'layer': usage_1 doesn't match its checksum"
    refused(path, ContainerError, says)
    with pytest.raises(ContainerError, match=says):
        container.open_container(path).usage("layer")
