"""Small matrices, containers and checkpoints' folders for the commands that read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from vqkernels import container
from vqkernels.container.checksums import raw_bytes
from vqkernels.formats import aqlm, vptq
from vqkernels.presets import parse_format
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

VPTQ = CodebookSpec(
    method="vptq",
    vector_axis="out",
    vector_length=4,
    stages=(16, 8),
    scale_axis="column",
    zero_axis="column",
    permuted=True,
)
AQLM = parse_format("aqlm-2x4")
RQ = CodebookSpec(method="rq", vector_length=4, stages=(16, 4), scale_axis="row")

DENSE = {
    "lm_head.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
    "model.embed_tokens.weight": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "model.norm.weight": torch.full((3,), -0.0, dtype=torch.float16),
    "model.steps": torch.tensor(7),
}
CONFIG = {"model_type": "tiny", "transformers_version": "4.57.1", "_name_or_path": "/home/me/x"}

Q, O = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"  # noqa: E741


def matrices(spec: CodebookSpec, n: int = 24, k: int = 32) -> dict[str, QuantizedTensor]:
    """Two matrices of a layer; the first has a bias, exact in float16."""
    first = random_tensor(spec, n, k, seed=1, bias=True, fit=False)
    bias = first.parts["bias"].half().float()
    return {Q: first.replace_parts(bias=bias), O: random_tensor(spec, n, n, seed=2, fit=False)}


def make_container(path: Path, spec: CodebookSpec = RQ) -> dict[str, QuantizedTensor]:
    tensors = matrices(spec)
    container.save(path, tensors, provenance={"note": "mine"}, made={Q: {"seed": 3}})
    return tensors


def make_vptq(folder: Path, *, shard_bytes: int = 10**9) -> dict[str, QuantizedTensor]:
    tensors = matrices(VPTQ)
    vptq.export(folder, tensors, config=CONFIG, dense=DENSE, shard_bytes=shard_bytes)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    return tensors


def make_aqlm(folder: Path) -> dict[str, QuantizedTensor]:
    tensors = matrices(AQLM)
    aqlm.export(folder, tensors, config=CONFIG, dense=DENSE)
    return tensors


def assert_same(found: QuantizedTensor, expected: QuantizedTensor, **spec: object) -> None:
    """Equal sizes, bits and specs, but for the fields `spec`."""
    wanted = dataclasses.replace(expected.spec, **spec)  # type: ignore[arg-type]  # any field
    assert (found.spec, found.n, found.k) == (wanted, expected.n, expected.k)
    assert set(found.parts) == set(expected.parts)
    for name, value in expected.parts.items():
        assert found.parts[name].dtype == value.dtype, name
        assert raw_bytes(found.parts[name].contiguous()) == raw_bytes(value.contiguous()), name
