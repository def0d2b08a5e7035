"""A GPU that NVML reports on as a script says, in place of the module `pynvml`.

    fake = install(monkeypatch, Gpu(), Gpu(reasons=0x40), Gpu(lost=True))

The script is a line of `Gpu`s: what the GPU is like at the first look, the second, ...; the last
one stays. A look is a round of questions: it ends when a question is asked for the second time, or
NVML is opened, so `device_state` is one look, however much it asks. `Gpu(lost=True)` has vanished;
`errors` lets single functions fail, by the name of NVML's error:
`{"nvmlDeviceGetMigMode": "NOT_SUPPORTED"}`. The GPU's UUID is `UUID`.

Another process sees the same GPU if `module(folder, *script)` is on its PYTHONPATH: a `pynvml.py`
that counts looks in a file beside it, so that processes that follow one another go through one
script: `module(folder, Gpu(), Gpu(), Gpu(reasons=0x40))` throttles in the second process, if each
looks twice, before and after. `looks(folder)` tells how far they are.

Constants and errors are those of pynvml (a test compares them), since both can't be imported.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["UUID", "FakeNvml", "Gpu", "NVMLError", "Process", "install", "looks", "module"]

UUID = "GPU-b"

CODES = {
    "UNINITIALIZED": 1,
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "TIMEOUT": 10,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "ARGUMENT_VERSION_MISMATCH": 25,
    "NO_DATA": 21,
    "UNKNOWN": 999,
}
TEXTS = {"GPU_IS_LOST": "GPU is lost"}
CONSTANTS = {
    "NVML_CLOCK_SM": 1,
    "NVML_CLOCK_MEM": 2,
    "NVML_TEMPERATURE_GPU": 0,
    "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN": 1,
    "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
    "NVML_VOLATILE_ECC": 0,
    "NVML_AGGREGATE_ECC": 1,
    "NVML_PERF_POLICY_POWER": 0,
    "NVML_PERF_POLICY_THERMAL": 1,
    "NVML_PERF_POLICY_BOARD_LIMIT": 3,
    **{f"NVML_ERROR_{name}": code for name, code in CODES.items()},
}


class NVMLError(Exception):
    """As pynvml's, made of a number, which is its `value`; each has a class of its own."""

    def __new__(cls, value: int) -> NVMLError:
        return super().__new__(ERRORS[value], value)

    def __init__(self, value: int) -> None:
        self.value = value

    def __str__(self) -> str:
        name = next(name for name, code in CODES.items() if code == self.value)
        return TEXTS.get(name, name.replace("_", " ").title())


def _class(name: str) -> str:
    return f"NVMLError_{name.title().replace('_', '')}"


ERRORS = {code: type(_class(name), (NVMLError,), {}) for name, code in CODES.items()}


@dataclasses.dataclass(frozen=True)
class Process:
    """One that computes. sm_percent: None where no sample names it. mps: through the MPS server."""

    pid: int
    memory_bytes: int | None = 1 << 30
    sm_percent: int | None = None
    mps: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the GPU is like at one look: a healthy H100 that runs at its highest clock."""

    lost: bool = False
    errors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    driver: str = "580.1"
    reasons: int = 0
    sm_mhz: int = 1980
    memory_mhz: int = 2619
    power_s: float = 0.0
    thermal_s: float = 0.0
    board_s: float = 0.0
    temperature_c: int = 41
    margin_c: int = 46
    slowdown_c: int = 87
    power_w: float = 123.456
    limit_w: float = 700.0
    default_w: float = 700.0
    ecc: bool = True
    ecc_volatile: int = 0
    ecc_aggregate: int = 0
    rows_pending: bool = False
    pages_pending: bool = False
    mig: bool = False
    persistence: bool = True
    busy_percent: int = 97
    processes: tuple[Process, ...] = ()


class FakeNvml:
    """The module. count: a file that grows by a byte a look, for processes that share a script."""

    NVMLError = NVMLError

    def __init__(self, *script: Gpu, count: Path | None = None) -> None:
        self.script = script or (Gpu(),)
        self.open = 0  # nvmlInit less nvmlShutdown
        self._count, self._looks = count, 0
        self._asked: set[tuple[Any, ...]] = set()
        for name, value in CONSTANTS.items():
            setattr(self, name, value)
        for error in ERRORS.values():
            setattr(self, error.__name__, error)

    @property
    def gpu(self) -> Gpu:
        """The GPU at the present look."""
        at = self._count.stat().st_size if self._count else self._looks
        return self.script[min(max(at, 1), len(self.script)) - 1]

    def _at(self, *question: Any) -> Gpu:
        """The GPU as it is when asked this; raises what the script says."""
        if not self.open:
            raise NVMLError(CODES["UNINITIALIZED"])
        if not self._asked or question in self._asked:
            self._asked.clear()
            self._looks += 1
            if self._count:
                with self._count.open("ab") as file:
                    file.write(b".")
        self._asked.add(question)
        gpu = self.gpu
        if gpu.lost:
            raise NVMLError(CODES["GPU_IS_LOST"])
        if question[0] in gpu.errors:
            raise NVMLError(CODES[gpu.errors[question[0]]])
        return gpu

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1
        self._asked.clear()

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str | None) -> str:  # noqa: N802
        if uuid != UUID:
            raise NVMLError(CODES["NOT_FOUND" if uuid else "INVALID_ARGUMENT"])
        return "handle"

    def __getattr__(self, name: str) -> Any:
        try:
            answer = ANSWERS[name]
        except KeyError:
            raise AttributeError(name) from None

        def ask(*arguments: Any) -> Any:
            return answer(self._at(name, *arguments), *arguments[1:])

        return ask


def _samples(gpu: Gpu, since_us: int) -> list[SimpleNamespace]:
    samples = [
        SimpleNamespace(pid=process.pid, smUtil=percent)
        for process in gpu.processes
        if process.sm_percent is not None
        for percent in (0, process.sm_percent)
    ]
    if not samples:
        raise NVMLError(CODES["NOT_FOUND"])
    return samples


def _listed(gpu: Gpu, mps: bool) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(pid=process.pid, usedGpuMemory=process.memory_bytes)
        for process in gpu.processes
        if process.mps == mps
    ]


ANSWERS: dict[str, Any] = {
    "nvmlSystemGetDriverVersion": lambda gpu: gpu.driver,
    "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: {1: 1980, 2: 2619}[kind],
    "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: gpu.sm_mhz, 2: gpu.memory_mhz}[kind],
    "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: gpu.reasons,
    "nvmlDeviceGetViolationStatus": lambda gpu, policy: SimpleNamespace(
        violationTime=round(1e9 * {0: gpu.power_s, 1: gpu.thermal_s, 3: gpu.board_s}[policy])
    ),
    "nvmlDeviceGetTemperature": lambda gpu, sensor: gpu.temperature_c,
    "nvmlDeviceGetTemperatureThreshold": lambda gpu, which: {1: gpu.slowdown_c}[which],
    "nvmlDeviceGetMarginTemperature": lambda gpu: gpu.margin_c,
    "nvmlDeviceGetPowerUsage": lambda gpu: round(gpu.power_w * 1000),
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: round(gpu.limit_w * 1000),
    "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: round(gpu.default_w * 1000),
    "nvmlDeviceGetEccMode": lambda gpu: [int(gpu.ecc)] * 2,
    "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, counter: {
        1: (gpu.ecc_volatile, gpu.ecc_aggregate)
    }[kind][counter],
    "nvmlDeviceGetRemappedRows": lambda gpu: (0, 0, int(gpu.rows_pending), 0),
    "nvmlDeviceGetRetiredPagesPendingStatus": lambda gpu: int(gpu.pages_pending),
    "nvmlDeviceGetMigMode": lambda gpu: [int(gpu.mig), 0],
    "nvmlDeviceGetPersistenceMode": lambda gpu: int(gpu.persistence),
    "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=gpu.busy_percent, memory=50),
    "nvmlDeviceGetComputeRunningProcesses": lambda gpu: _listed(gpu, mps=False),
    "nvmlDeviceGetMPSComputeRunningProcesses": lambda gpu: _listed(gpu, mps=True),
    "nvmlDeviceGetProcessUtilization": _samples,
}


def install(monkeypatch: Any, *script: Gpu) -> FakeNvml:
    """Put a fake in pynvml's place in this process."""
    fake = FakeNvml(*script)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def module(folder: Path, *script: Gpu) -> Path:
    """Write a `pynvml.py` that plays the script, for a PYTHONPATH that names the folder first."""
    (folder / "looks").touch()
    (folder / "pynvml.py").write_text(
        "import importlib.util, sys\n"
        "from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('fake_nvml', {str(Path(__file__))!r})\n"
        "fake = importlib.util.module_from_spec(spec)\n"
        "sys.modules['fake_nvml'] = fake\n"
        "spec.loader.exec_module(fake)\n"
        "Gpu, Process = fake.Gpu, fake.Process\n"
        f"script = {script!r}\n"
        "count = Path(__file__).with_name('looks')\n"
        "sys.modules[__name__] = fake.FakeNvml(*script, count=count)\n",
        encoding="utf-8",
    )
    return folder


def looks(folder: Path) -> int:
    """How often processes have looked at the GPU of `module(folder, ...)`."""
    return (folder / "looks").stat().st_size
