import dataclasses
import importlib.metadata
import importlib.util
import inspect
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.autotune import zoo
from vqkernels import kernel
from vqkernels.device import detect_cpu
from vqkernels.errors import BackendError
from vqkernels.kernel import Kernel, Packed, library_versions, registry
from vqkernels.kernels.torch import dense
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec


@pytest.fixture
def fresh():
    """A registry that is scanned anew, and forgotten afterwards."""
    registry.cache_clear()
    yield
    registry.cache_clear()


class FakePoint:
    """An entry point: what `load` returns, or raises."""

    def __init__(self, name, result):
        self.name, self.result = name, result

    def load(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def points(monkeypatch, fresh):
    found = []

    def entry_points(group):
        assert group == "vqkernels.kernels"
        return found

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return found


def test_built_in_kernels_are_found_by_scanning():
    found = registry().kernels
    folder = Path(kernel.__file__).parent / "kernels" / "torch"
    files = {path.stem for path in folder.glob("*.py") if "KERNEL = " in path.read_text("utf-8")}
    assert {name for name in found if name.startswith("torch/")} == {
        f"torch/{stem}" for stem in files
    }
    assert found["torch/dense"] is dense.KERNEL
    assert all(one.id == name for name, one in found.items())


def test_the_registry_is_scanned_once_and_not_changed():
    assert registry() is registry()
    with pytest.raises(TypeError):
        registry().kernels["mine"] = dense.KERNEL


def test_a_kernel_of_another_package_is_found(points):
    mine = zoo.make_kernel(name="mine")
    points.append(FakePoint("mine", mine))
    assert registry()["test/mine"] is mine
    assert "torch/dense" in registry().kernels


@pytest.mark.parametrize("error", [ImportError("no CUDA"), ZeroDivisionError("broken")])
def test_a_broken_package_is_reported_and_the_rest_is_there(points, error):
    points += [FakePoint("broken", error), FakePoint("mine", zoo.make_kernel(name="mine"))]
    found = registry()
    assert found.missing["broken"] == f"{type(error).__name__}: {error}"
    assert {"torch/dense", "test/mine"} <= set(found.kernels)


@pytest.mark.parametrize("error", [ImportError, OSError, ZeroDivisionError])
def test_a_backend_that_does_not_import_is_reported(monkeypatch, fresh, error):
    real = importlib.import_module

    def import_module(name, package=None):
        if name == "vqkernels.kernels.torch.table":
            raise error("libcuda is missing")
        return real(name, package)

    monkeypatch.setattr(kernel.importlib, "import_module", import_module)
    found = registry()
    assert "libcuda is missing" in found.missing["torch.table"]
    assert "torch/table" not in found.kernels
    assert "torch/dense" in found.kernels


def test_a_kernel_that_says_nothing_of_wide_vectors_is_never_asked_about_them():
    def supports(problem, device):
        assert problem.spec.vector_width == 1, "a kernel of before there were wide vectors"
        return "not today" if problem.m > 1 else None

    old = dataclasses.replace(registry()["torch/table"], supports=supports)
    narrow = CodebookSpec(vector_length=4, stages=(16,))
    wide = dataclasses.replace(narrow, vector_width=2)
    cpu, problem = detect_cpu(), Problem(m=1, n=64, k=64, spec=narrow)
    assert old.supports(problem, cpu) is None
    assert old.supports(dataclasses.replace(problem, m=2), cpu) == "not today"
    assert "vectors of 2 rows" in old.supports(dataclasses.replace(problem, spec=wide), cpu)
    assert inspect.unwrap(old.supports) is supports


def test_wide_vectors_are_taken_by_kernels_that_say_so_and_by_no_other():
    spec = CodebookSpec(vector_length=8, vector_width=2, stages=(256,))
    problem = Problem(m=1, n=64, k=64, spec=spec)
    taking = {
        kernel.id
        for kernel in registry().kernels.values()
        if kernel.supports(problem, detect_cpu()) is None
    }
    assert taking == {"torch/dense", "torch/dequant", "numba/naive"}


def test_an_unknown_kernel_names_those_there_are():
    with pytest.raises(BackendError) as error:
        registry()["torch/none"]
    assert "'torch/none' is unknown or can't load; there are: " in str(error.value)
    assert "torch/dense" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def copied(tmp_path):
    """A copy of the torch backend, and a function that loads its dense kernel anew."""
    folder = tmp_path / "backend"
    shutil.copytree(Path(dense.__file__).parent, folder, ignore=shutil.ignore_patterns("__*"))

    def load() -> Kernel:
        spec = importlib.util.spec_from_file_location("copied_dense", folder / "dense.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.KERNEL

    return folder, load


def test_a_source_hash_is_stable(copied):
    _, load = copied
    assert load().source_hash == load().source_hash
    assert len(load().source_hash) == 64
    assert dense.KERNEL.source_hash == registry()["torch/table"].source_hash  # one folder


@pytest.mark.parametrize("name", ["dense.py", "dequant.py", "table.py"])
def test_a_source_hash_changes_with_any_file_of_its_folder(copied, name):
    folder, load = copied
    before = load().source_hash
    path = folder / name
    path.write_text(path.read_text("utf-8") + "\n# changed\n", encoding="utf-8")
    assert load().source_hash != before


def test_a_source_hash_sees_cuda_headers_and_names_and_nothing_else(copied):
    folder, load = copied
    hashes = [load().source_hash]
    (folder / "notes.txt").write_text("nothing", encoding="utf-8")
    assert load().source_hash == hashes[0]
    (folder / "dense.cuh").write_text("__device__", encoding="utf-8")
    hashes.append(load().source_hash)
    (folder / "dense.cuh").rename(folder / "decoy.cuh")  # in the same place of the order
    hashes.append(load().source_hash)
    assert len(set(hashes)) == 3


def test_packed_bytes_are_those_of_all_arrays_wherever_they_are():
    packed = Packed({"codes": torch.arange(5, dtype=torch.uint8), "books": torch.ones(3, 2)})
    assert packed.nbytes == packed.to("meta").nbytes == 5 + 3 * 2 * 4
    assert packed.to("meta")["codes"].device.type == "meta"
    assert "books" in packed
    assert "bias" not in packed


def test_a_clone_has_memory_of_its_own():
    packed = Packed({"codes": torch.zeros(4)})
    clone = packed.clone()
    clone["codes"].fill_(1)
    assert packed["codes"].sum() == 0


def test_versions_of_what_is_installed_only(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "numba":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["numpy"] == real("numpy")
    assert "numba" not in versions


def test_a_module_without_a_kernel_is_no_kernel(monkeypatch, fresh):
    empty = types.ModuleType("empty")
    monkeypatch.setattr(kernel, "_builtin_modules", lambda: ["empty"])
    monkeypatch.setitem(sys.modules, "empty", empty)
    assert not [name for name in registry().kernels if name.startswith("torch/")]
    assert "empty" not in registry().missing


def test_what_a_kernel_rounds_to_is_xs_dtype_where_it_rounds_at_all():
    plain = Problem(m=1, n=8, k=16, spec=zoo.SPEC, dtype="bfloat16")
    rotated = dataclasses.replace(plain, spec=dataclasses.replace(zoo.SPEC, scale_axis="column"))
    assert zoo.make_kernel().rounds_to(plain) is None
    assert zoo.make_kernel().rounds_to(rotated) == "bfloat16"
    assert zoo.make_kernel(rounds_weights=True).rounds_to(plain) == "bfloat16"
    assert zoo.make_kernel(half_chain=4).rounds_to(plain) == "bfloat16"
