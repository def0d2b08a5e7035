"""The state of a GPU by NVML: clocks, throttling, power, memory errors, modes, who else computes.

What the GPU, its driver or this user's rights don't answer is None under its own key.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RUN", "THROTTLE_REASONS", "THROTTLING", "gpu_state", "throttle_names"]

# The environment variable that names a run to processes of other interpreters, by its PID.
RUN = "VQBENCH_RUN"

# NVML's bits for why the clocks are where they are.
THROTTLE_REASONS = {
    0x1: "gpu_idle",
    0x2: "app_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}

# Those that hold clocks below what was asked for. The others are an idle GPU, a setting, or (for
# reliability) the voltage that limits the highest clock of any GPU.
THROTTLING = frozenset(
    {"sw_power_cap", "hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake", "board_limit"}
)

# Answers that mean "this can't be told": by this GPU, to this user, by a driver of this age, or for
# want of a sample. Every other error is of a GPU that fails.
_UNANSWERED = (
    "INVALID_ARGUMENT",
    "NOT_SUPPORTED",
    "NO_PERMISSION",
    "NOT_FOUND",
    "FUNCTION_NOT_FOUND",
    "ARGUMENT_VERSION_MISMATCH",
    "NO_DATA",
)

_PROC = Path("/proc")

# The inode of the host's own PID namespace (the kernel's PROC_PID_INIT_INO).
_HOST_PIDS = "pid:[4026531836]"

# From a worker up to its run: the server that it was forked from, and the server's parent.
_GENERATIONS = 2

# Samples of what other processes use are kept for some seconds; these are as long as a case takes.
_USE_WINDOW_S = 2.0


def gpu_state(uuid: str | None) -> dict[str, Any]:
    """What NVML says now of the GPU with this UUID; `nvml_error` where it doesn't answer.

    Never raises. Keys end in their unit; modes (`ecc`, `mig`, `persistence`) are True or False.
    """
    state: dict[str, Any] = {"monotonic_s": time.monotonic(), "uuid": uuid}
    try:
        nvml = importlib.import_module("pynvml")
        gpu, facts = _open(nvml, uuid, os.getpid())
        answers = _answers(nvml, gpu, _QUERIES)
        names = throttle_names(answers["throttle_reasons"])
        return state | facts | answers | {"throttle_names": names} | _processes(nvml, gpu)
    except Exception as error:  # NVML's, or a broken library's: the run goes on without
        _open.cache_clear()
        return state | {"nvml_error": str(error) or type(error).__name__}


def throttle_names(reasons: int | None) -> list[str] | None:
    """The names of the bits of a mask; a bit that has no name here by its value."""
    if reasons is None:
        return None
    bits = [1 << place for place in range(reasons.bit_length()) if reasons >> place & 1]
    return [THROTTLE_REASONS.get(bit, hex(bit)) for bit in bits]


@functools.lru_cache(maxsize=8)
def _open(nvml: Any, uuid: str | None, process: int) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001 (a fork needs a handle of its own)
    """The GPU's handle and what doesn't change. NVML stays open: opening it takes longest."""
    nvml.nvmlInit()
    try:
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return gpu, _answers(nvml, gpu, _FACTS)
    except Exception:
        nvml.nvmlShutdown()
        raise


Query = Callable[[Any, Any], Any]


def _answers(nvml: Any, gpu: Any, queries: Mapping[str, Query]) -> dict[str, Any]:
    return {key: _ask(nvml, gpu, query) for key, query in queries.items()}


def _ask(nvml: Any, gpu: Any, query: Query) -> Any:
    """The answer, or None where there is none to be had; raises where the GPU fails."""
    try:
        return query(nvml, gpu)
    except AttributeError:  # a pynvml that is older than the question
        return None
    except nvml.NVMLError as error:
        if error.value in {getattr(nvml, f"NVML_ERROR_{name}", None) for name in _UNANSWERED}:
            return None
        raise


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _throttled_s(policy: str) -> Query:
    """Seconds, since the driver was loaded, that a policy held the clocks down."""

    def query(nvml: Any, gpu: Any) -> float:
        status = nvml.nvmlDeviceGetViolationStatus(gpu, getattr(nvml, f"NVML_PERF_POLICY_{policy}"))
        return float(status.violationTime) / 1e9

    return query


def _uncorrected(counter: str) -> Query:
    return lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, getattr(nvml, f"NVML_{counter}_ECC")
    )


def _rows_pending(nvml: Any, gpu: Any) -> bool:
    rows = _ask(nvml, gpu, lambda nvml, gpu: nvml.nvmlDeviceGetRemappedRows(gpu)[2])
    return bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(gpu) if rows is None else rows)


_FACTS: dict[str, Query] = {
    "driver": lambda nvml, _: _text(nvml.nvmlSystemGetDriverVersion()),
    "sm_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "slowdown_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperatureThreshold(
        gpu, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    ),
    "power_default_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu) / 1000,
}

# margin_c: to the temperature that slows it down, on GPUs since Ada in place of `slowdown_c`.
# ecc_volatile, ecc_aggregate: uncorrected errors since the driver was loaded, and ever.
# rows_pending: memory waits to be replaced at the next reset (pages, on GPUs before Ampere).
# busy_percent: the part of the driver's last sample period in which a kernel ran, whosever.
_QUERIES: dict[str, Query] = {
    "throttle_reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "throttled_power_s": _throttled_s("POWER"),
    "throttled_thermal_s": _throttled_s("THERMAL"),
    "throttled_board_s": _throttled_s("BOARD_LIMIT"),
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(
        gpu, nvml.NVML_TEMPERATURE_GPU
    ),
    "margin_c": lambda nvml, gpu: nvml.nvmlDeviceGetMarginTemperature(gpu),
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "power_limit_w": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    "ecc": lambda nvml, gpu: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
    "ecc_volatile": _uncorrected("VOLATILE"),
    "ecc_aggregate": _uncorrected("AGGREGATE"),
    "rows_pending": lambda nvml, gpu: _rows_pending(nvml, gpu),
    "mig": lambda nvml, gpu: bool(nvml.nvmlDeviceGetMigMode(gpu)[0]),
    "persistence": lambda nvml, gpu: bool(nvml.nvmlDeviceGetPersistenceMode(gpu)),
    "busy_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
}


def _processes(nvml: Any, gpu: Any) -> dict[str, Any]:
    """Who computes on the GPU.

    processes: how many, with our own. foreign: those that aren't of this run, each with its
    `memory_bytes` and the `sm_percent` that it used in the last seconds. host_pids: whether this
    process sees the host's PIDs. If not (in a container), NVML names the host's, or only those of
    the container, by the driver's age: `foreign` are then those that are surely of the container,
    `unplaced_pids` may be anybody's, and some may not be listed at all.
    """
    listed: dict[int, Any] = {}
    asked = 0
    for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses"):
        found = _ask(nvml, gpu, _named(name))
        asked += found is not None
        listed |= {process.pid: process for process in found or ()}
    if not asked:
        return dict.fromkeys(("processes", "foreign", "unplaced_pids", "host_pids"))
    host = _sees_host_pids()
    root = _run()
    others = [pid for pid in sorted(listed) if not _descends(pid, root)]
    unplaced = [] if host else [pid for pid in others if _parent(pid) is None]
    foreign = [pid for pid in others if pid not in unplaced]
    used = _sm_percent(nvml, gpu) if foreign and host else None
    return {
        "processes": len(listed),
        "foreign": [
            {
                "pid": pid,
                "memory_bytes": listed[pid].usedGpuMemory,
                "sm_percent": None if used is None else used.get(pid, 0),
            }
            for pid in foreign
        ],
        "unplaced_pids": unplaced,
        "host_pids": host,
    }


def _named(function: str) -> Query:
    return lambda nvml, gpu: getattr(nvml, function)(gpu)


def _sm_percent(nvml: Any, gpu: Any) -> dict[int, int] | None:
    """The most that each process used in the last seconds, by the host's PID; None if untold."""
    since_us = int((time.time() - _USE_WINDOW_S) * 1e6)
    try:
        samples = nvml.nvmlDeviceGetProcessUtilization(gpu, since_us)
    except nvml.NVMLError as error:
        # no sample: nobody used it
        return {} if error.value == nvml.NVML_ERROR_NOT_FOUND else None
    used: dict[int, int] = {}
    for sample in samples:
        used[sample.pid] = max(used.get(sample.pid, 0), sample.smUtil)
    return used


def _sees_host_pids() -> bool:
    try:
        return str((_PROC / "self/ns/pid").readlink()) == _HOST_PIDS
    except OSError:
        return False


def _run() -> int:
    """The process that this run began with: the one that RUN names, ours, or a parent in the same
    interpreter.

    A launcher written in Python that starts jobs of its own is taken for part of the run.
    """
    top = os.getpid()
    told = os.environ.get(RUN, "")
    if told.isdecimal() and _descends(top, int(told)):
        return int(told)
    for _ in range(_GENERATIONS):
        above = _parent(top)
        if above is None or _program(above) != _program(top):
            break
        top = above
    return top


def _program(pid: int) -> Path | None:
    try:
        return (_PROC / str(pid) / "exe").readlink()
    except OSError:  # another user's
        return None


def _descends(pid: int, root: int) -> bool:
    at: int | None = pid
    while at is not None and at != root:
        at = _parent(at)
    return at == root


def _parent(pid: int) -> int | None:
    """The parent's PID, 0 for the first process; None for a process that can't be seen."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
        return int(stat.rpartition(")")[2].split()[1])  # the name before may hold anything
    except (OSError, ValueError, IndexError):
        return None
