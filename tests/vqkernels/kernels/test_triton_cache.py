"""What is compiled ahead is what a launch looks for in Triton's disk cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import compiling_environment

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]

# A driver that says what an H100's would, so that the launcher gets as far as its compiler.
CODE = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import MockTensor
from autotune.inspection import stand_in
from tests.vqkernels.kernels import keep_cubins
from vqkernels.kernel import registry
from vqkernels.kernels.triton.program import _DTYPES

TARGET = GPUTarget("cuda", 90, 32)

class Driver:
    def get_current_target(self): return TARGET
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

class Asked(Exception):
    pass

def asked(source, target, options):
    raise Asked(source.hash(), options)

triton.runtime.driver.set_active(Driver())
triton.compiler.compile = asked  # the launcher's own
dtypes = {name: dtype for dtype, name in _DTYPES.items()}
found = {}
for kernel in registry().kernels.values():
    if kernel.backend != "triton":
        continue
    for m in (1, 16):
        problem = keep_cubins.problem("aqlm-2x8", m)
        for program in kernel.programs(kernel.default(problem, stand_in("sm_90")), problem):
            tensors = {name: MockTensor(dtypes[kind]) for name, kind in program.pointers.items()}
            try:
                program.function.warmup(
                    **tensors, **program.numbers, **program.constants, **program._options(),
                    grid=program.grid,
                )
            except Asked as launched:
                key, options = launched.args
            ours = make_backend(TARGET).parse_options(program._options()).__dict__
            found[f"{kernel.id} m={m}"] = [program._source().hash() == key, ours == options]
print(json.dumps(found))
"""


def test_a_launch_finds_what_was_compiled_without_a_driver() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=compiling_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 12
    assert {name: same for name, same in found.items() if same != [True, True]} == {}
