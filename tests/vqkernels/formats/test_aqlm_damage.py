"""Checkpoints have no checksums: what damage leaves is refused in one line, or in range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vqkernels.formats.folder_damage import assert_met_and_told, check, outcome
from vqkernels.formats.aqlm import dequantize, export
from vqkernels.presets import parse_format
from vqkernels.tensor import random_tensor


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint in one file, one in shards with vectors of two rows, and one of int16 codes."""
    base = tmp_path_factory.mktemp("originals")
    dense = {"lm_head.weight": torch.randn(2, 2)}
    for name, spec, shard_bytes in (
        ("whole", "aqlm-2x5-g1x4", 1 << 20),
        ("shards", "aqlm-1x4-g2x2", 1),
        ("wide codes", "aqlm-1x9-g1x2", 1 << 20),
    ):
        tensors = {}
        for seed, matrix in enumerate(("m.0.q_proj", "m.1.q_proj", "m.1.up")):
            tensor = random_tensor(parse_format(spec), 8, 16, seed=seed, fit=False)
            width = tensor.spec.vector_width
            scale = tensor.parts["scale"][::width].repeat_interleave(width)
            tensors[matrix] = tensor.replace_parts(scale=scale)
        export(base / name, tensors, dense=dense, shard_bytes=shard_bytes)
    folders = sorted(base.iterdir())
    for folder in folders:
        assert outcome(folder, dequantize) == "loads"
    return folders


def test_random_damage_is_refused_or_in_range(originals: list[Path], tmp_path: Path) -> None:
    assert_met_and_told(check(originals, tmp_path, range(150), dequantize))


@pytest.mark.sweep
@pytest.mark.parametrize("start", range(10_000, 12_000, 1000))
def test_much_random_damage_is_refused_or_in_range(
    start: int, originals: list[Path], tmp_path: Path
) -> None:
    check(originals, tmp_path, range(start, start + 1000), dequantize)
