"""What a conversion sees of its source."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

from bench.sources import View, digest_of, stored_bytes
from tests.bench.checkpoints import DENSE, RQ, O, Q, make_container, make_vptq, matrices
from tests.strategies import quantized_tensors
from vqkernels.container import open_container
from vqkernels.dense import DenseFile
from vqkernels.formats import open_source, vptq
from vqkernels.parallel import open_parallel, save_parallel
from vqkernels.tensor import QuantizedTensor


def test_a_view_shows_what_was_chosen(tmp_path: Path) -> None:
    make_container(tmp_path / "x.safetensors")
    read: list[str] = []
    source = open_container(tmp_path / "x.safetensors")
    view = View(source, [O], traversal="column", on_read=read.append)
    assert (list(view), len(view), O in view, Q in view) == ([O], 1, True, False)
    with pytest.raises(KeyError):
        view[Q]
    assert view.outline(O).spec.traversal == "column"
    assert read == []
    assert view[O].spec.traversal == "column"
    assert read == [O]
    assert view.made == {}
    assert View(source, [Q, O]).made == {Q: {"seed": 3}}


@settings(max_examples=30)
@given(quantized_tensors(max_side=8))
def test_a_digest_tells_apart_what_decodes_to_something_else(tensor: QuantizedTensor) -> None:
    told = digest_of(tensor)
    for name, value in tensor.parts.items():
        bits = value.clone().view(torch.uint8)
        bits.view(-1)[-1] ^= 1
        assert digest_of(tensor.replace_parts(**{name: bits.view(value.dtype)})) != told
    sides = {"coefficients": [9.0] * len(tensor.spec.stages), "stride": 99}
    for field, value in sides.items():
        changed: dict[str, Any] = {field: value}
        spec = dataclasses.replace(tensor.spec, group_axis="tensor", group_size=0, **changed)
        assert digest_of(dataclasses.replace(tensor, spec=spec)) != told


@pytest.mark.parametrize(
    "fields",
    [{"method": "pq"}, {"distance": "cosine"}, {"traversal": "column"}, {"code_bits": (9, 9)}],
)
def test_a_digest_is_of_what_weights_depend_on(fields: dict[str, Any]) -> None:
    tensor = matrices(RQ)[Q]
    spec = dataclasses.replace(tensor.spec, **fields)
    assert digest_of(dataclasses.replace(tensor, spec=spec)) == digest_of(tensor)
    assert digest_of(dataclasses.replace(tensor, n=23)) != digest_of(tensor)


def test_bytes_where_a_matrix_lies(tmp_path: Path) -> None:
    tensors = make_vptq(tmp_path / "vptq")
    source = open_source(tmp_path / "vptq")
    # 24/4 rows of 32 cells of 7 bits, in words; two codebooks; permutation, scale and bias; bias
    words = 6 * -(-32 * 7 // 32) * 4
    assert stored_bytes(source, Q) == words + (16 + 8) * 4 * 2 + 32 * 2 * 3 + 24 * 2
    vptq.export(tmp_path / "two", {"a": tensors[Q], "ab": tensors[Q]})
    assert stored_bytes(open_source(tmp_path / "two"), "a") == stored_bytes(source, Q)
    save_parallel(tmp_path / "ranks", tensors, ranks=2)
    ranks = open_parallel(tmp_path / "ranks")
    assert stored_bytes(ranks, Q) == sum(rank.outline(Q).stored_bytes for rank in ranks.ranks)
    assert stored_bytes(View(source, [Q]), Q) is None


def test_a_dense_file_reads_what_is_asked_for(tmp_path: Path) -> None:
    save_file(DENSE, tmp_path / "dense.safetensors")
    dense = DenseFile(tmp_path / "dense.safetensors")
    assert set(dense) == set(DENSE)
    assert len(dense) == len(DENSE)
    assert torch.equal(dense["model.steps"], torch.tensor(7))
    with pytest.raises(KeyError):
        dense["other"]
