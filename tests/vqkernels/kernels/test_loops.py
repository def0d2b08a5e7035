"""Instructions that `work` counts, against the hot loops of the machine code."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import compiling_environment
from tests.vqkernels.kernels import keep_cubins, loops
from tests.vqkernels.kernels.loops import Loop

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")
pytest.importorskip("triton", reason="nvdisasm comes with Triton")

from vqkernels.device import known_device
from vqkernels.kernel import registry
from vqkernels.space import Config, Value

ROOT = Path(__file__).resolve().parents[3]

# Off by so much at most; what Triton makes of a tile is less regular.
CUDA, TRITON = 0.2, 0.35


MORE = [pytest.param(one, marks=pytest.mark.sweep, id=str(one)) for one in loops.MORE_CUDA]


@pytest.mark.parametrize("one", [*loops.CUDA, *MORE], ids=str)
def test_a_cuda_kernel(one: Loop) -> None:
    assert loops.counted(one) == pytest.approx(loops.compiled(one), rel=CUDA)


@pytest.mark.sweep
def test_triton_kernels(tmp_path: Path) -> None:
    """In one process of their own: Triton is interpreting in this one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vqkernels.kernels.loops", "triton"],
        cwd=ROOT,
        env=compiling_environment() | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(loops.TRITON)
    off = {name: ours / real - 1 for name, (ours, real) in found.items()}
    assert {name: share for name, share in off.items() if abs(share) > TRITON} == {}


def value(text: str) -> Value:
    return int(text) if text.isdigit() else {"True": True, "False": False}.get(text, text)


def test_registers_and_shared_memory_of_the_kept_table() -> None:
    """Registers, guessed from tiles, within half and double; CUDA's shared memory to the byte."""
    h100, off = known_device("h100"), []
    with keep_cubins.TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arch"] == "sm_90" and row["registers"]]
    for row in rows:
        kernel, problem = (
            registry()[row["kernel"]],
            keep_cubins.problem(row["format"], int(row["m"])),
        )
        pairs = (item.split("=") for item in row["config"].split())
        config = Config(**{name: value(text) for name, text in pairs})
        assert kernel.work is not None
        first = kernel.work(config, problem, h100)[0]
        if not 0.5 <= first.registers / int(row["registers"]) <= 2:
            off.append((row["kernel"], row["config"], first.registers, row["registers"]))
        if kernel.backend == "cuda":
            assert first.shared_bytes == int(row["shared_bytes"])
    assert len(rows) > 50
    assert len(off) <= len(rows) // 20, off
