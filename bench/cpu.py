"""The state of the CPUs that this process may run on: clocks, load, and who used them so far."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["cpu_state"]

_SYSTEM = Path("/sys/devices/system/cpu")
_PROC = Path("/proc")

# Of a line of /proc/stat, behind the CPU's name: user, nice, system, irq and softirq (a guest's
# time is part of user's); idle and waiting for input or output.
_BUSY = (0, 1, 2, 5, 6)
_IDLE = (3, 4)
_STEAL = (7,)

_TICKS = ("busy_ticks", "idle_ticks", "steal_ticks")

T = TypeVar("T")


def cpu_state() -> dict[str, Any]:
    """Where they stand now; what this machine doesn't tell is None. Never raises.

    busy_ticks, idle_ticks, steal_ticks: since boot, in hundredths of a second, of all processes.
    own_cpu_s: of this process and the children that it has waited for.
    thermal_throttles: how often a core or its package was slowed down for heat, since boot.
    pressure_s: how long some task waited for a CPU, since boot. mhz: of one of the CPUs, since
    old kernels take 10 ms to tell it.
    """
    cpus = sorted(os.sched_getaffinity(0))
    return {
        "monotonic_s": time.monotonic(),
        "cpus": _known(_allowed),
        "load_1m": _known(lambda: os.getloadavg()[0]),
        "governor": _governor(cpus),
        "mhz": _known(_mhz, cpus[0]),
        **dict(zip(_TICKS, _known(_ticks, cpus) or (None,) * 3, strict=True)),
        "own_cpu_s": time.process_time() + _children_s(),
        "thermal_throttles": _thermal_throttles(cpus),
        "pressure_s": _known(_pressure_s),
    }


def _known(question: Callable[..., T], *arguments: object) -> T | None:
    try:
        return question(*arguments)
    except (OSError, ValueError, LookupError):  # no such file here, or not as we know it
        return None


def _read(cpu: int, name: str) -> str:
    return (_SYSTEM / f"cpu{cpu}" / name).read_text(encoding="ascii").strip()


def _allowed() -> str:
    """The CPUs as ranges: `0-3,8`."""
    lines = (_PROC / "self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return fields["Cpus_allowed_list"].strip()


def _governor(cpus: Iterable[int]) -> str | None:
    """The governor; several, if they differ, in one string."""
    found = {_known(_read, cpu, "cpufreq/scaling_governor") for cpu in cpus}
    return " and ".join(sorted(name for name in found if name)) or None


def _mhz(cpu: int) -> float:
    return int(_read(cpu, "cpufreq/scaling_cur_freq")) / 1000


def _ticks(cpus: Iterable[int]) -> list[int]:
    """Busy, idle and stolen, summed over the CPUs."""
    names = {f"cpu{cpu}" for cpu in cpus}
    lines = (_PROC / "stat").read_text(encoding="ascii").splitlines()
    counts = [[int(n) for n in rest] for name, *rest in map(str.split, lines) if name in names]
    if not counts:
        raise LookupError
    return [sum(count[at] for count in counts for at in kind) for kind in (_BUSY, _IDLE, _STEAL)]


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _thermal_throttles(cpus: Iterable[int]) -> int | None:
    counts = [
        _known(int, _known(_read, cpu, f"thermal_throttle/{kind}_throttle_count") or "")
        for cpu in cpus
        for kind in ("core", "package")
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _pressure_s() -> float:
    some = (_PROC / "pressure/cpu").read_text(encoding="ascii").splitlines()[0]
    return int(some.rpartition("total=")[2]) / 1e6
