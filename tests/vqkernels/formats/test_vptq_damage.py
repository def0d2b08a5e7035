"""Checkpoints have no checksums: what damage leaves is refused in one line, or in range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vqkernels.formats.folder_damage import assert_met_and_told, check, outcome
from vqkernels.formats.vptq import dequantize, export
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor

SPEC = CodebookSpec(
    method="vptq",
    vector_axis="out",
    vector_length=3,
    stages=(8, 4),
    group_axis="column",
    group_size=7,
    scale_axis="column",
    zero_axis="column",
    permuted=True,
    outlier_columns=2,
    outlier_entries=5,
    outlier_vector_length=4,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint in one file, one in shards, and one with unpacked codes."""
    base = tmp_path_factory.mktemp("originals")
    tensors = {
        name: random_tensor(SPEC, 8, 16, seed=seed, fit=False)
        for seed, name in enumerate(("m.0.q_proj", "m.1.q_proj", "m.1.up"))
    }
    dense = {"lm_head.weight": torch.randn(2, 2)}
    export(base / "whole", tensors, dense=dense)
    export(base / "shards", tensors, dense=dense, shard_bytes=1)
    export(base / "unpacked", tensors, dense=dense)
    path = base / "unpacked" / "config.json"
    config = json.loads(path.read_text())
    stored = load_file(base / "unpacked" / "model.safetensors")
    for name, tensor in tensors.items():
        config["quantization_config"]["config_for_layers"][name]["is_indice_packed"] = False
        codes = tensor.parts["codes"].to(torch.int16).reshape(3, 2, 7, 2).permute(1, 0, 2, 3)
        for stage, key in enumerate(("indices", "res_indices")):
            stored[f"{name}.{key}"] = codes[..., stage].contiguous()
        stored[f"{name}.perm"] = stored[f"{name}.perm"].long()
    path.write_text(json.dumps(config))
    save_file(stored, base / "unpacked" / "model.safetensors")
    folders = sorted(base.iterdir())
    for folder in folders:
        assert outcome(folder, dequantize) == "loads"
    return folders


def test_random_damage_is_refused_or_in_range(originals: list[Path], tmp_path: Path) -> None:
    seen = check(originals, tmp_path, range(150), dequantize)
    assert_met_and_told(seen)


@pytest.mark.sweep
@pytest.mark.parametrize("start", range(10_000, 13_000, 1000))
def test_much_random_damage_is_refused_or_in_range(
    start: int, originals: list[Path], tmp_path: Path
) -> None:
    check(originals, tmp_path, range(start, start + 1000), dequantize)
