"""From a program's text to machine code by NVRTC, kept on disk between processes.

A file of the cache is named by everything that its content depends on: the text, all headers of
this folder, options, architecture and the compiler's version. It begins with its own checksum, so
a file that was cut short or damaged is made anew, as is one that another version wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import shutil
import threading
import warnings
from pathlib import Path

from cuda.bindings import nvrtc

from vqkernels.atomic import write_atomically
from vqkernels.errors import BackendError, ContainerError

__all__ = ["Compiled", "cache_folder", "compile_text", "compiler_name", "cuda_headers"]

FOLDER = Path(__file__).parent
_MAGIC = b"vqbench cubin 1\n"
_STANDARD = "c++17"
_NEEDED = "cuda_fp16.h"

_INSTALL = "pip install 'nvidia-cuda-nvrtc>=13.0,<13.1' 'nvidia-cuda-runtime>=13.0,<13.1' cuda-core"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Machine code, what made it, and the dynamic shared memory that its launch asks for."""

    cubin: bytes
    compiler: str
    shared_bytes: int = 0


@functools.lru_cache(maxsize=256)
def compile_text(text: str, arch: int) -> Compiled:
    """Machine code of `text` for `sm_<arch>`, from the cache where it is there.

    Raises BackendError where the compiler or CUDA's headers are missing, where it doesn't know the
    architecture, or where the text doesn't compile.
    """
    name = compiler_name()
    path = cache_folder() / f"{_key(text, arch, name)}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = _compile(text, arch)
        _keep(path, cubin)
    return Compiled(cubin, name)


def cache_folder() -> Path:
    """Where machine code is kept: VQBENCH_CACHE, or `vqbench` in the user's cache folder."""
    if chosen := os.environ.get("VQBENCH_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vqbench"


@functools.cache
def compiler_name() -> str:
    """`nvrtc` and its version. Raises BackendError where it is missing."""
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # bindings without the library that they bind
        raise BackendError(f"NVRTC can't be loaded ({error}); {_INSTALL}") from error
    if int(status):
        raise BackendError(f"NVRTC tells no version ({status}); {_INSTALL}")
    try:
        return f"nvrtc {importlib.metadata.version('nvidia-cuda-nvrtc')}"
    except importlib.metadata.PackageNotFoundError:  # of a toolkit
        return f"nvrtc {major}.{minor}"


@functools.cache
def cuda_headers() -> Path:
    """The folder of CUDA's own headers. Raises BackendError where there is none."""
    for folder in _header_folders():
        if (folder / _NEEDED).is_file():
            return folder
    raise BackendError(
        f"CUDA's headers ({_NEEDED}) are missing; {_INSTALL}, or set CUDA_HOME to a toolkit"
    )


def _header_folders() -> list[Path]:
    folders = []
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        if found := find_nvidia_header_directory("cudart"):
            folders.append(Path(found))
    except (ImportError, RuntimeError):
        pass  # an older cuda-core: the places below are what it would look at
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    folders += [Path(home) / "include" for home in homes if home]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent.parent / "include")
    return [*folders, Path("/usr/local/cuda/include")]


def _key(text: str, arch: int, name: str) -> str:
    digest = hashlib.sha256(_MAGIC)
    for piece in (text, f"sm_{arch}", _STANDARD, name, _sources()):
        digest.update(hashlib.sha256(piece.encode()).digest())
    return digest.hexdigest()


@functools.cache
def _sources() -> str:
    """Everything that a text may include from here; read once a process, as imports are."""
    headers = sorted(FOLDER.rglob("*.cuh"))
    return "\0".join(f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in headers)


def _compile(text: str, arch: int) -> bytes:
    headers = cuda_headers()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=f"sm_{arch}",
        std=_STANDARD,
        include_path=[str(FOLDER), str(FOLDER / "include"), str(headers)],
    )
    try:
        code = Program(text, "c++", options).compile("cubin").code
    except Exception as error:  # cuda-core raises its own types, which differ by version
        raise BackendError(_cause(str(error), arch)) from None
    return bytes(code)


def _cause(log: str, arch: int) -> str:
    """One line of NVRTC's log, with what to do about it."""
    if "gpu-architecture" in log:
        return (
            f"{compiler_name()} doesn't know sm_{arch}; it compiles for {_known_archs()}; install "
            f"a newer nvidia-cuda-nvrtc"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line] or lines or ["no message"]
    return f"{compiler_name()}, sm_{arch}: {telling[0]}"


def _known_archs() -> str:
    _, archs = nvrtc.nvrtcGetSupportedArchs()
    return ", ".join(f"sm_{arch}" for arch in archs)


def _read(path: Path) -> bytes | None:
    """The machine code in a file of the cache; None where there is none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC)
    cubin = content[head + 32 :]
    whole = content[:head] == _MAGIC and content[head : head + 32] == hashlib.sha256(cubin).digest()
    return cubin if whole else None


def _keep(path: Path, cubin: bytes) -> None:
    """Write a file of the cache; a disk that is full or read-only costs time, not the result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [_MAGIC, hashlib.sha256(cubin).digest(), cubin])
    except (OSError, ContainerError) as error:
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"compiled kernels are not kept: {error}; or set VQBENCH_CACHE to another folder",
                RuntimeWarning,
                stacklevel=2,
            )


_warned = threading.Event()  # once a process is enough
