"""Device and detect(): where a problem runs, from what the system itself reports.

Peak rates that no driver tells are data in `devices/*.toml`, or None: never invented.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from vqkernels.errors import BackendError

__all__ = ["Device", "detect", "detect_cpu", "detect_gpus", "known_device", "known_devices"]

_KNOWN = Path(__file__).parent / "devices"
_TABLES = ("flops", "multiprocessor", "rates")
_SYSTEM_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A CPU or GPU. Sizes in bytes, rates per second, None where nobody has told.

    arch: `x86_64-avx512`, `sm_90`.
    units: threads a CPU run may use, or multiprocessors.
    llc_bytes: the last-level cache: the L3 of a CPU, the L2 of a GPU.
    bandwidth: peak of main memory; flops: peak by input dtype, fp32 accumulation.
    multiprocessor, rates: of a GPU, what `autotune.predict` reads; the keys of these tables of
        `devices/*.toml`, empty where there is no such file.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    arch: str
    units: int
    llc_bytes: int
    memory_bytes: int
    index: int = 0
    l1_bytes: int | None = None
    l2_bytes: int | None = None
    shared_bytes: int | None = None
    bandwidth: float | None = None
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    multiprocessor: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    uuid: str | None = None
    driver: str | None = None

    @property
    def slug(self) -> str:
        """The name as a folder: letters, digits and single dashes."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.arch}".lower()).strip("-")

    @property
    def torch_name(self) -> str:
        """The device as torch names it."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields for a record."""
        tables = {name: dict(getattr(self, name)) for name in _TABLES}
        return dataclasses.asdict(self) | tables


def detect(kind: str = "auto") -> Device:
    """The device that `kind` names: `cpu`, `cuda`, `cuda:1`, or the first GPU that is there.

    Raises BackendError where a GPU was asked for by name and none answers.
    """
    if kind == "cpu":
        return detect_cpu()
    gpus = detect_gpus()
    if kind == "auto":
        return gpus[0] if gpus else detect_cpu()
    match = re.fullmatch(r"cuda(?::(\d+))?", kind)
    if not match:
        raise BackendError(f"device {kind!r} is unknown; use cpu, cuda, cuda:N or auto")
    index = int(match.group(1) or 0)
    if index >= len(gpus):
        raise BackendError(
            f"device {kind}: {len(gpus)} NVIDIA GPU(s) answer here; check nvidia-smi, or use cpu"
        )
    return gpus[index]


def detect_cpu(threads: int | None = None) -> Device:
    """This machine's CPU: model, caches and the threads that may run here."""
    info = _cpuinfo()
    caches = _cache_sizes()
    return Device(
        kind="cpu",
        name=info.get("model name") or platform.processor() or platform.machine(),
        arch=f"{platform.machine()}{_vector_extension(info.get('flags', ''))}",
        units=threads or _available_threads(),
        l1_bytes=caches.get((1, "Data")),
        l2_bytes=caches.get((2, "Unified")),
        # a machine that tells nothing is treated as having 32 MiB, so that "cold" errs to cold
        llc_bytes=caches.get((3, "Unified")) or caches.get((2, "Unified")) or 32 << 20,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def detect_gpus() -> list[Device]:
    """The NVIDIA GPUs that torch can use, as NVML reports them; none without a driver."""
    if not torch.cuda.is_available():
        return []
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, index) for index in range(torch.cuda.device_count())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def known_devices() -> dict[str, dict[str, Any]]:
    """The tables of `devices/*.toml`, by file name."""
    return {
        path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
        for path in sorted(_KNOWN.glob("*.toml"))
    }


def known_device(name: str) -> Device:
    """The device of `devices/*.toml` that `name` names, or the only one that it is part of.

    As it stands in the file, on a machine that may have none. Raises BackendError.
    """
    tables = known_devices()
    found = [stem for stem in tables if stem == name] or [stem for stem in tables if name in stem]
    if len(found) != 1:
        raise BackendError(
            f"device {name!r} names {'several' if found else 'none'} of the known ones; "
            f"use one of {', '.join(found or tables)}"
        )
    facts = tables[found[0]]
    return Device(
        kind="cuda",
        name=facts["name"],
        arch=facts["arch"],
        units=facts["multiprocessors"],
        llc_bytes=facts["l2_bytes"],
        memory_bytes=facts["memory_bytes"],
        **_peaks(facts),
    )


def _peaks(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What no driver tells, of a table of `devices/*.toml`."""
    peaks = {name: facts.get(name) for name in ("shared_bytes", "bandwidth")}
    return peaks | {name: facts.get(name, {}) for name in _TABLES}


def _gpu(nvml: Any, index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    # by UUID: torch counts the devices that CUDA_VISIBLE_DEVICES leaves, NVML counts all
    uuid = f"GPU-{properties.uuid}"
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    name = _text(nvml.nvmlDeviceGetName(handle))
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    facts = next((t for t in known_devices().values() if re.search(t["match"], name)), {})
    return Device(
        kind="cuda",
        index=index,
        name=name,
        arch=f"sm_{major}{minor}",
        units=int(properties.multi_processor_count),
        llc_bytes=int(properties.L2_cache_size),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        uuid=uuid,
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        **_peaks(facts),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _vector_extension(flags: str) -> str:
    words = flags.split()
    for flag, name in (("avx512f", "-avx512"), ("avx2", "-avx2")):
        if flag in words:
            return name
    return ""


def _cache_sizes() -> dict[tuple[int, str], int]:
    sizes = {}
    units = {"K": 1 << 10, "M": 1 << 20}
    for folder in sorted(_SYSTEM_CACHES.glob("index*")):
        try:
            level = int((folder / "level").read_text())
            kind = (folder / "type").read_text().strip()
            size = (folder / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        sizes[level, kind] = int(size.rstrip("KM")) * units.get(size[-1], 1)
    return sizes


def _available_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
