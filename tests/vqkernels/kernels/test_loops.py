"""Instructions that `work` counts, against the hot loops of the machine code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import compiling_environment
from tests.vqkernels.kernels import loops
from tests.vqkernels.kernels.loops import Loop

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")
pytest.importorskip("triton", reason="nvdisasm comes with Triton")

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
