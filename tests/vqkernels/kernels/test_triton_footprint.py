"""Shared memory that the Triton kernels declare: known before, and without, machine code.

Against what is compiled: see test_cubins.py.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.inspection import stand_in
from tests.interpreter import compiling_environment
from tests.vqkernels.kernels import keep_cubins
from vqkernels.device import detect_cpu
from vqkernels.kernel import Kernel, registry

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
KERNELS = [kernel for kernel in registry().kernels.values() if kernel.backend == "triton"]
PROBLEM = keep_cubins.problem("aqlm-2x8", 64)

SETUP = """
import dataclasses
import itertools
import json
from autotune.inspection import ARCHS, inspect_kernel, stand_in
from tests.vqkernels.kernels import keep_cubins
from vqkernels.kernel import registry
from vqkernels.kernels.triton import program
from vqkernels.kernels.triton.program import Program

PROBLEM = keep_cubins.problem("aqlm-2x8", 64)
mma = registry()["triton/mma"]
# 32 KB of x and 16 KB of weight a stage, and what sums and pipeline add
changes = {"tokens": 128, "tile_outputs": 128, "tile_k": 128, "warps": 8, "stages": 3}
config = mma.default(PROBLEM, stand_in("sm_90")).replace(**changes)

def no_compiler(self, arch):
    raise AssertionError("compiled")

def shared(arch, problem=PROBLEM, device=None):
    return mma.footprint(config, problem, device or stand_in(arch)).shared_bytes
"""


def child(code: str, folder: Path) -> Any:
    """What `code` prints as JSON in a process in which Triton compiles: here it interprets."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        cwd=ROOT,
        env=compiling_environment() | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_can_not_launch_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    code = """
Program.compile = no_compiler
found = {arch: next(inspect_kernel(mma, PROBLEM, arch, config)) for arch in ("sm_86", "sm_90")}
fields = ("status", "reason", "shared_bytes", "compile_s")
print(json.dumps({a: [getattr(one, f) for f in fields] for a, one in found.items()}))
"""
    found = child(code, tmp_path)
    status, reason, shared, seconds = found["sm_86"]
    assert (status, seconds) == ("constraint", None)
    assert reason == f"needs {shared:,} bytes of shared memory a block; sm_86 has 101,376"
    # where it fits, the compiler is what comes next
    assert found["sm_90"] == ["compile", "AssertionError: compiled", None, None]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".ptx", ".cubin")]


def test_other_versions_of_triton_compile_whole(tmp_path: Path) -> None:
    """Where stages and passes aren't what they were, the figure is the compiler's, and the same."""
    code = """
known = [shared(arch) for arch in ("sm_86", "sm_90")]
program._SHARED.clear()
def gone(*_):
    raise AttributeError("no such pass")
program._allocate = gone
print(json.dumps([known, [shared(arch) for arch in ("sm_86", "sm_90")]]))
"""
    passes, whole = child(code, tmp_path)
    assert passes == whole
    assert all(shared > 99 << 10 for shared in passes)


def test_a_figure_is_found_once(tmp_path: Path) -> None:
    """Shapes that specialise alike share it; nothing of an architecture or a config does."""
    code = """
calls = []
allocate = program._allocate
def counted(*arguments):
    calls.append(arguments)
    return allocate(*arguments)
program._allocate = counted
first = shared("sm_90")
again = shared("sm_90", dataclasses.replace(PROBLEM, n=8192, k=11008))
here = len(calls)
other = shared("sm_80")
amd = dataclasses.replace(stand_in("sm_90"), arch="gfx942")
print(json.dumps([first == again, here, other != first, len(calls), shared("", device=amd)]))
"""
    assert child(code, tmp_path) == [True, 1, True, 2, 0]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_nothing_is_declared_where_nothing_compiles(kernel: Kernel) -> None:
    """The interpreter replaces the functions; a CPU has no blocks."""
    gpu = stand_in("sm_90")
    config = kernel.default(PROBLEM, gpu)
    for device in (gpu, dataclasses.replace(gpu, arch="sm_90a"), detect_cpu()):
        assert kernel.footprint(config, PROBLEM, device).shared_bytes == 0


@pytest.mark.sweep
def test_samples_of_the_spaces_on_other_architectures(tmp_path: Path) -> None:
    """Beside sm_90, where they are in the table: all for mma, whose figure hangs on it most."""
    code = """
others = [arch for arch in ARCHS if arch != "sm_90"]
turn = itertools.cycle(others)
found = []
for kernel in registry().kernels.values():
    if kernel.backend != "triton":
        continue
    for _, _, problem, _, config in keep_cubins.sampled(kernel):
        for arch in others if kernel.name == "mma" else [next(turn)]:
            declared = kernel.footprint(config, problem, stand_in(arch)).shared_bytes
            programs = [p.compile(int(arch[3:])) for p in kernel.programs(config, problem)]
            taken = max(program.metadata.shared for program in programs)
            found.append([f"{kernel.id} {arch} {config}", declared, taken])
print(json.dumps(found))
"""
    found = child(code, tmp_path)
    assert len(found) > 2 * len(KERNELS)
    for what, declared, taken in found:
        assert taken <= declared <= 1.15 * taken, f"{what}: {declared} declared, {taken} taken"
