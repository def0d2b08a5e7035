"""`vqbench doctor`, on this machine and on ones that lack things."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench.available import PACKAGES, Package, check_package, install_command
from bench.cli import cli
from bench.commands import doctor
from bench.nvml import _open
from tests.bench.fake_nvml import UUID, Gpu, Process, install
from vqkernels.device import Device

ROOT = Path(__file__).resolve().parents[2]

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"numba", "triton", "cuda"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from bench.cli import main
main()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOOK_S", 0.0)
    _open.cache_clear()


def examine() -> tuple[int, dict[str, dict[str, Any]]]:
    result = CliRunner().invoke(cli, ["doctor", "-o", "json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, {row["check"]: row for row in json.loads(result.stdout)}


def gpu(**fields: Any) -> Device:
    return Device(
        **{
            "kind": "cuda",
            "name": "NVIDIA H100",
            "arch": "sm_90",
            "units": 132,
            "llc_bytes": 50 << 20,
            "memory_bytes": 80 << 30,
            "driver": "580.1",
            "uuid": UUID,
            **fields,
        }
    )


def test_this_machine_can_run() -> None:
    code, found = examine()
    assert code == 0
    assert found["thread pool"]["detail"] == "numba's: shared with torch"
    assert found["torch"]["detail"].startswith(torch.__version__)
    for check in ("python", "torch", "cpu", "numba", "thread pool", "minilm weights", "kernels"):
        assert found[check]["status"] == "ok", found[check]
    assert {"gpu", "triton", "cuda-core", "cuda-python", "nvrtc", "disk", "aqlm"} <= {
        "gpu" if check.startswith("gpu") else check for check in found
    }
    assert all(row["fix"] for row in found.values() if row["status"] == "problem")


@pytest.mark.parametrize("arguments", [["doctor"], ["list"]], ids=["doctor", "list"])
def test_blocked_packages_are_named_with_their_command(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "-m pip install 'numba>=0.61'" in done.stdout
    assert "torch/table" in done.stdout or "3 torch" in done.stdout
    if arguments == ["doctor"]:
        for requirement in ("triton>=3.6", "cuda-core>=0.5", "nvidia-cuda-nvrtc>=13.0,<13.1"):
            assert f"-m pip install '{requirement}'" in done.stdout
        assert "`vqbench run` can run here" in done.stderr


def test_broken_package_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise OSError('no libllvm\\nsecond line')\n")
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "doctor", "-o", "json"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    found = {row["check"]: row for row in json.loads(done.stdout)}
    assert found["numba"]["status"] == "problem"
    assert "OSError: no libllvm)" in found["numba"]["detail"]
    assert "'numba>=0.61'" in found["numba"]["fix"]
    assert done.returncode == (found["kernels"]["status"] != "ok")


def test_gpu_that_torch_cannot_use_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "detect_gpus", lambda: [gpu()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    code, found = examine()
    assert code == 1
    assert found["gpu 0"]["status"] == "ok"
    assert found["torch and gpu"]["status"] == "problem"
    assert "--force-reinstall torch==2.13.0" in found["torch and gpu"]["fix"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the NVIDIA driver" in examine()[1]["torch and gpu"]["fix"]


def test_gpu_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "detect_gpus", lambda: [gpu(), gpu(index=1)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, found = examine()
    assert code == 0
    assert found["torch and gpu"]["detail"] == "torch can use 2 of 2 GPUs"
    assert "580.1" in found["gpu 1"]["detail"]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu], dict[str, dict[str, Any]]]:
    """What doctor finds of a GPU as NVML reports it; nothing of it stops a run."""

    def look(seen: Gpu) -> dict[str, dict[str, Any]]:
        _open.cache_clear()
        install(monkeypatch, seen)
        monkeypatch.setattr(doctor, "detect_gpus", lambda: [gpu()])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        code, checks = examine()
        assert code == 0
        return {name.removeprefix("gpu 0 "): row for name, row in checks.items()}

    return look


def test_a_gpu_fit_for_measuring(found: Callable[[Gpu], dict[str, dict[str, Any]]]) -> None:
    checks = found(Gpu())
    names = ("persistence", "ecc", "mig", "power limit", "processes")
    assert [checks[name]["status"] for name in names] == ["ok"] * 5
    assert not any(checks[name]["fix"] for name in names)
    assert checks["power limit"]["detail"] == "700 W, by default 700 W"


@pytest.mark.parametrize(
    ("seen", "check", "detail", "fix"),
    [
        (Gpu(persistence=False), "persistence", "off", "sudo nvidia-smi -i GPU-b -pm 1"),
        (Gpu(ecc_volatile=2), "ecc", "on, uncorrected errors: 2", "--gpu-reset"),
        (Gpu(rows_pending=True), "ecc", "memory waits to be replaced", "--gpu-reset"),
        (Gpu(mig=True), "mig", "on", "-mig 0"),
        (Gpu(limit_w=400), "power limit", "400 W, by default 700 W", "-pl 700"),
        (Gpu(processes=(Process(1), Process(2))), "processes", "others': 1 2", "or kill 1 2"),
        (Gpu(lost=True), "state", "NVML: GPU is lost", "nvidia-smi -q"),
    ],
)
def test_what_makes_a_gpus_times_doubtful_has_a_fix(
    found: Callable[[Gpu], dict[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    seen: Gpu,
    check: str,
    detail: str,
    fix: str,
) -> None:
    monkeypatch.setattr("bench.nvml._sees_host_pids", lambda: True)
    finding = found(seen)[check]
    assert finding["status"] == "problem"
    assert detail in finding["detail"]
    assert fix in finding["fix"]


def test_what_a_gpu_does_not_tell_is_unknown_and_no_problem(
    found: Callable[[Gpu], dict[str, dict[str, Any]]],
) -> None:
    names = ("MigMode", "PersistenceMode", "EccMode", "TotalEccErrors", "EnforcedPowerLimit")
    lists = ("ComputeRunningProcesses", "MPSComputeRunningProcesses")
    errors = {f"nvmlDeviceGet{name}": "NOT_SUPPORTED" for name in (*names, *lists)}
    checks = found(Gpu(errors=errors))
    for name in ("persistence", "ecc", "mig", "power limit", "processes"):
        assert checks[name]["status"] == "ok"
        assert "unknown" in checks[name]["detail"]


def test_a_container_hides_processes(
    found: Callable[[Gpu], dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.nvml._sees_host_pids", lambda: False)
    hidden = Process(4_194_305)  # beyond the kernel's highest PID
    finding = found(Gpu(processes=(hidden,)))["processes"]
    assert finding["detail"] == "no others'; 1 unknown, and a container may hide some"


def test_cpus_that_others_use_and_a_governor_that_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {
        "load_1m": 1.5,
        "governor": None,
        "busy_ticks": 0,
        "idle_ticks": 0,
        "steal_ticks": 0,
        "own_cpu_s": 0.0,
    }
    busy = {"busy_ticks": 30, "idle_ticks": 70, "own_cpu_s": 0.05}

    def look(**last: object) -> dict[str, dict[str, Any]]:
        states = iter([quiet | {"governor": last.get("governor")}, quiet | last])
        monkeypatch.setattr(doctor, "cpu_state", lambda: next(states))
        return examine()[1]

    found = look(**busy, governor="powersave")
    assert found["cpu load"]["status"] == found["cpu governor"]["status"] == "problem"
    assert found["cpu load"]["detail"] == (
        "load 1.50 over the last minute; now: others used 25 % of the CPUs"
    )
    assert "end what else runs" in found["cpu load"]["fix"]
    assert "cpupower" in found["cpu governor"]["fix"]
    found = look(**busy | {"busy_ticks": 6})
    assert found["cpu load"]["status"] == found["cpu governor"]["status"] == "ok"
    assert found["cpu load"]["detail"].endswith("now: free")
    assert "unknown" in found["cpu governor"]["detail"]
    assert look(governor="performance")["cpu governor"]["status"] == "ok"


def test_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    monkeypatch.setattr(doctor, "detect_gpus", list)
    monkeypatch.setattr(doctor, "_PCI", tmp_path)
    code, found = examine()
    assert found["gpu"]["status"] == "problem"
    assert "nvidia-driver" in found["gpu"]["fix"]
    assert code == 0  # the CPU kernels need none
    (card / "class").write_text("0x040300\n")  # its sound device alone
    assert examine()[1]["gpu"]["status"] == "missing"


def test_what_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("NVML is in a mood\nand says more")

    monkeypatch.setattr(doctor, "detect_gpus", broken)
    monkeypatch.setattr(doctor, "registry", broken)
    code, found = examine()
    assert code == 1
    assert found["gpu"]["detail"] == "RuntimeError: NVML is in a mood"
    assert found["kernels"]["status"] == "problem"


def test_full_disk_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, found = examine()
    assert code == 1
    assert found["disk"]["status"] == "problem"
    assert "--results DIR" in found["disk"]["fix"]


def test_requirements_are_those_of_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    stated = {requirement.partition(";")[0].strip() for requirement in listed}
    assert {package.requirement for package in PACKAGES.values()} <= stated
    assert {"nvidia-cuda-nvrtc>=13.0,<13.1", "nvidia-ml-py>=12.560"} <= stated
    assert f"TORCH := {doctor.TORCH}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_check_package_tells_absent_from_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vqb_half.py").write_text("import vqb_absent_dependency\n")
    (tmp_path / "vqb_whole.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    absent, half, whole = (
        Package(name, f"{name}>=1", "tests") for name in ("vqb_absent", "vqb_half", "vqb_whole")
    )
    assert check_package(absent) == ("missing", "not installed")
    assert check_package(half) == ("problem", "installed, but needs vqb_absent_dependency")
    assert check_package(whole) == ("ok", "of unknown version")


def test_install_command_is_for_this_interpreter_and_quoted() -> None:
    command = install_command("x>=1,<2")
    assert command.startswith(f"{sys.executable} -m pip install 'x>=1,<2'")
    assert command.endswith(f"-c {ROOT / 'constraints.txt'}")
