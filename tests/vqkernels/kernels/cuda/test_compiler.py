"""NVRTC and its cache on disk: whole files or none, and what goes wrong in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vqkernels.errors import BackendError, ContainerError
from vqkernels.kernels.cuda import compiler

TEXT = """#include <device.cuh>
extern "C" __global__ void vq_kernel(float* out) { vq::global(out).store(0, 1.0f); }
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, and a process that remembers nothing."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache"


def forget() -> None:
    for function in (
        compiler.compile_text,
        compiler._sources,
        compiler.compiler_name,
        compiler.cuda_headers,
    ):
        function.cache_clear()
    compiler._warned.clear()


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def no_compiler(*_: object) -> bytes:
    raise AssertionError("compiled again")


def test_machine_code_of_the_architecture_comes_out(cache: Path) -> None:
    from autotune.cubin import read_cubin

    for arch in (80, 120):
        compiled = compiler.compile_text(TEXT, arch)
        code = read_cubin(compiled.cubin)
        assert (code.arch, code.function) == (f"sm_{arch}", "vq_kernel")
        assert compiled.compiler.startswith("nvrtc 13.")
    assert len(files(cache)) == 2


def test_the_next_process_does_not_compile(monkeypatch, cache: Path) -> None:
    first = compiler.compile_text(TEXT, 90)
    forget()
    monkeypatch.setattr(compiler, "_compile", no_compiler)
    assert compiler.compile_text(TEXT, 90) == first


@pytest.mark.parametrize("what", ["text", "arch", "headers", "compiler", "standard"])
def test_everything_that_code_depends_on_is_in_its_name(monkeypatch, cache: Path, what) -> None:
    compiler.compile_text(TEXT, 90)
    forget()
    text, arch = TEXT, 90
    if what == "text":
        text += "// other\n"
    elif what == "arch":
        arch = 89
    elif what == "headers":
        monkeypatch.setattr(compiler, "_sources", lambda: "other")
    elif what == "compiler":
        monkeypatch.setattr(compiler, "compiler_name", lambda: "nvrtc 99")
    else:
        monkeypatch.setattr(compiler, "_STANDARD", "c++20")
    monkeypatch.setattr(compiler, "_compile", lambda *_: b"made anew")
    # cached functions that were replaced have no cache to clear
    assert compiler.compile_text(text, arch).cubin == b"made anew"
    assert len(files(cache)) == 2
    monkeypatch.undo()


def test_headers_are_part_of_the_sources() -> None:
    assert "struct Arguments" in compiler._sources()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content.replace(b"cubin 1", b"cubin 0", 1),
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    ],
    ids=["one byte short", "cut in its head", "empty", "of another version", "a bit flipped"],
)
def test_a_damaged_file_is_made_anew(cache: Path, damage) -> None:
    good = compiler.compile_text(TEXT, 90)
    (path,) = files(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    forget()
    assert compiler.compile_text(TEXT, 90) == good
    assert files(cache) == [path]
    assert path.read_bytes() == whole


def test_a_full_disk_costs_time_and_a_word(monkeypatch, cache: Path) -> None:
    def full(path: Path, pieces: object) -> None:
        raise ContainerError(f"{path}: can't be written (No space left on device)")

    monkeypatch.setattr(compiler, "write_atomically", full)
    with pytest.warns(RuntimeWarning, match=r"not kept: .*No space.*VQBENCH_CACHE"):
        assert compiler.compile_text(TEXT, 90).cubin
    assert compiler.compile_text(TEXT, 80).cubin, "said once: a warning is an error here"
    assert files(cache) == []


def test_a_cache_folder_that_cannot_be_made(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="not kept"):
        assert compiler.compile_text(TEXT, 90).cubin


def test_processes_that_compile_the_same_at_once(cache: Path) -> None:
    command = f"from vqkernels.kernels.cuda import compiler as c; c.compile_text({TEXT!r}, 90)"
    racers = [subprocess.Popen([sys.executable, "-c", command]) for _ in range(4)]
    assert [racer.wait(timeout=120) for racer in racers] == [0] * 4
    assert [path.suffix for path in files(cache)] == [".cubin"], "nothing half-written is left"


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    with pytest.raises(BackendError, match=r"nvrtc 13.* doesn't know sm_70; .*sm_75.*sm_120"):
        compiler.compile_text(TEXT, 70)


def test_a_text_that_does_not_compile() -> None:
    with pytest.raises(BackendError, match=r"sm_90: .*\(2\): error: .*nonsense") as caught:
        compiler.compile_text('#include <device.cuh>\nextern "C" nonsense f() {}', 90)
    assert "\n" not in str(caught.value)


def test_missing_headers(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "_header_folders", lambda: [Path("/nowhere")])
    with pytest.raises(BackendError, match=r"cuda_fp16.h.*missing; pip install.*CUDA_HOME"):
        compiler.compile_text(TEXT, 90)


def test_headers_of_a_toolkit(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_fp16.h").write_text("")
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert compiler.cuda_headers() == tmp_path / "include"


def test_a_missing_compiler(monkeypatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(compiler.nvrtc, "nvrtcVersion", missing)
    with pytest.raises(BackendError, match=r"NVRTC can't be loaded .*libnvrtc.*; pip install"):
        compiler.compile_text(TEXT, 90)


def test_where_the_cache_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VQBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "vqbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_folder() == Path.home() / ".cache" / "vqbench"
