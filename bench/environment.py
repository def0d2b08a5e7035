"""What a result depends on besides the code: the machine, its state, and the versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

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
    """What changes from minute to minute: load and clocks of a CPU, NVML's figures of a GPU."""
    if device.kind == "cuda":
        return _gpu_state(device)
    return {
        "load_1m": os.getloadavg()[0],
        "steal_ticks": _steal_ticks(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "mhz": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")),
    }


def _gpu_state(device: Device) -> dict[str, Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        state = {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"nvml_error": str(error)}
    return state


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


def _steal_ticks() -> int | None:
    line = _read(Path("/proc/stat"))
    fields = line.split("\n", 1)[0].split() if line else []
    return int(fields[8]) if len(fields) > 8 else None  # ticks that the hypervisor took


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
