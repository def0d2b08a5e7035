"""What a result depends on besides the code: the machine, its state, and the versions."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from bench.cpu import cpu_state
from bench.nvml import gpu_state
from vqkernels.device import Device
from vqkernels.kernel import library_versions

__all__ = ["describe_host", "device_state", "project_revision"]

_ROOT = Path(__file__).resolve().parent.parent


def describe_host(device: Device) -> dict[str, Any]:
    """Host, system, versions and the device, for the head of every record."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "device": device.to_dict(),
        "versions": library_versions(),
        "project": project_revision(),
    }


def project_revision() -> dict[str, Any]:
    """Commit of the source tree and whether it has changes; None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    # a prefix: installed somewhere inside another project's checkout, whose commit says nothing
    if commit is None or _git("rev-parse", "--show-prefix"):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def device_state(device: Device) -> dict[str, Any]:
    """What changes from minute to minute; `bench.validity` judges two such states.

    Never raises: what can't be told is None, a GPU that doesn't answer has an `nvml_error`.
    """
    return gpu_state(device.uuid) if device.kind == "cuda" else cpu_state()


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
