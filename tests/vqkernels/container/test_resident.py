"""A container of 4 GB is mapped when it is opened, not read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vqkernels.container import shards, stored
from vqkernels.container.manifest import TensorInfo
from vqkernels.container.write import Prepared, prepare
from vqkernels.parts import part_table
from vqkernels.presets import PRESETS
from vqkernels.tensor import random_tensor

ROOT = Path(__file__).parents[3]
SPEC = PRESETS["vq-256x8"]
SHARD = 1 << 30

READER = """
import json, sys
from pathlib import Path
from vqkernels import container

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

before = kilobytes("VmRSS")
source = container.open_container(sys.argv[1])
stored = sum(tensor.stored_bytes for tensor in source.info.tensors)
opened = [kilobytes("VmRSS") - before, kilobytes("VmHWM") - before]
codes = source["small.3"].parts["codes"].tolist()
used = [kilobytes("VmRSS") - before, kilobytes("VmHWM") - before]
print(json.dumps({"stored": stored, "opened": opened, "used": used, "codes": codes}))
"""


def sparse(path: Path, pieces: Sequence[bytes | memoryview], *, named: Path) -> None:
    """As `write_through`, but holes where a piece is large: all of it is zeros."""
    with path.open("xb") as file:
        for piece in pieces:
            size = memoryview(piece).nbytes
            if size < SHARD // 2:
                file.write(piece)
            else:
                file.seek(size, 1)
        file.truncate(file.tell())


def large(name: str, zeros: Path) -> Prepared:
    """A matrix with a gigabyte of codes, of zeros that lie in no memory; checksums are made up."""
    n, k = SHARD // 32768, 8 * 32768
    info = TensorInfo(
        name=name,
        spec=SPEC,
        n=n,
        k=k,
        bias=False,
        coding=("packed",),
        usage=False,
        checksums={},
        decoded_checksum="0" * 64,
    )
    table = part_table(SPEC, n, k)
    parts = {"codes": torch.from_file(str(zeros), True, SHARD // 4, dtype=torch.int32).view(n, -1)}
    parts |= {
        part: torch.zeros(entry.shape, dtype=entry.dtype)
        for part, entry in table.items()
        if part != "codes"
    }
    assert set(parts) == set(stored.stored_table(info))
    described: dict[str, Any] = {**vars(info), "checksums": dict.fromkeys(parts, "0" * 64)}
    described["part_bytes"] = {part: value.nbytes for part, value in parts.items()}
    return Prepared(TensorInfo(**described), parts)


@pytest.mark.sweep
def test_4_gb_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.disk_usage(tmp_path).free < 5 * SHARD:
        pytest.skip("less than 5 GB of disk are free, and its files may not be sparse")
    zeros, folder = tmp_path / "zeros", tmp_path / "set"
    zeros.touch()
    with zeros.open("r+b") as file:
        file.truncate(SHARD)
    monkeypatch.setattr(shards, "write_through", sparse)
    folder.mkdir()
    writer = shards.ShardWriter(folder, None)
    small = [random_tensor(SPEC, 64, 256, seed=number) for number in range(4)]
    for number in range(4):
        writer.add(large(f"large.{number}", zeros))
        writer.add(prepare(f"small.{number}", small[number]))
        writer.flush()
    writer.finish()
    assert len(list(folder.glob("model-*.safetensors"))) == 4
    done = subprocess.run(
        [sys.executable, "-c", READER, folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["stored"] > 4 << 30
    assert max(seen["opened"]) < 200_000, seen
    assert max(seen["used"]) < 200_000, seen
    assert seen["codes"] == small[3].parts["codes"].tolist()
