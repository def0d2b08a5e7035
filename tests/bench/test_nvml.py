import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from bench import nvml
from bench.nvml import THROTTLE_REASONS, THROTTLING, gpu_state, throttle_names
from tests.bench import fake_nvml
from tests.bench.fake_nvml import UUID, Gpu, Process, install, looks, module

ROOT = Path(__file__).resolve().parents[2]
PRESENT = os.getpid()
RUN, SERVER, WORKER, SIBLING, SHELL, FOREIGN = 100, 101, 102, 103, 50, 4711


@pytest.fixture(autouse=True)
def closed():
    nvml._open.cache_clear()
    yield
    nvml._open.cache_clear()


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """A worker (this process), its server and run, started from a shell, and another's process."""
    parents = {1: 0, SHELL: 1, RUN: SHELL, SERVER: RUN, WORKER: SERVER, SIBLING: SERVER, FOREIGN: 1}
    programs = {SHELL: "bash", FOREIGN: "python3"}
    for pid, parent in parents.items():
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (a) name R) S {parent} 1 1")
        (folder / "exe").symlink_to(f"/usr/bin/{programs.get(pid, 'python3')}")
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[4026531836]")
    monkeypatch.setattr(nvml, "_PROC", tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: WORKER)
    return tmp_path


def test_a_state_has_seconds_watts_megahertz_and_degrees(monkeypatch):
    install(monkeypatch, Gpu(reasons=0x24, power_s=2.5, thermal_s=0.25, board_s=1.0))
    state = gpu_state(UUID)
    assert state.pop("monotonic_s") > 0
    assert state.pop("host_pids") in (True, False)
    assert state == {
        "uuid": UUID,
        "driver": "580.1",
        "sm_mhz": 1980,
        "sm_max_mhz": 1980,
        "memory_mhz": 2619,
        "memory_max_mhz": 2619,
        "throttle_reasons": 0x24,
        "throttle_names": ["sw_power_cap", "sw_thermal"],
        "throttled_power_s": 2.5,
        "throttled_thermal_s": 0.25,
        "throttled_board_s": 1.0,
        "temperature_c": 41,
        "slowdown_c": 87,
        "margin_c": 46,
        "power_w": 123.456,
        "power_limit_w": 700.0,
        "power_default_w": 700.0,
        "ecc": True,
        "ecc_volatile": 0,
        "ecc_aggregate": 0,
        "rows_pending": False,
        "mig": False,
        "persistence": True,
        "busy_percent": 97,
        "processes": 0,
        "foreign": [],
        "unplaced_pids": [],
    }
    assert json.loads(json.dumps(state, allow_nan=False)) == state


FUNCTIONS = {
    "nvmlDeviceGetCurrentClocksThrottleReasons": {"throttle_reasons", "throttle_names"},
    "nvmlDeviceGetViolationStatus": {
        "throttled_power_s",
        "throttled_thermal_s",
        "throttled_board_s",
    },
    "nvmlDeviceGetClockInfo": {"sm_mhz", "memory_mhz"},
    "nvmlDeviceGetMaxClockInfo": {"sm_max_mhz", "memory_max_mhz"},
    "nvmlDeviceGetTemperatureThreshold": {"slowdown_c"},
    "nvmlDeviceGetEccMode": {"ecc"},
    "nvmlDeviceGetTotalEccErrors": {"ecc_volatile", "ecc_aggregate"},
    "nvmlDeviceGetMigMode": {"mig"},
    "nvmlDeviceGetUtilizationRates": {"busy_percent"},
    "nvmlDeviceGetMPSComputeRunningProcesses": set(),
    "nvmlDeviceGetRemappedRows": set(),  # asked for pages instead
}


@pytest.mark.parametrize(("function", "keys"), FUNCTIONS.items(), ids=list(FUNCTIONS))
@pytest.mark.parametrize("error", ["NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND"])
def test_what_a_gpu_does_not_tell_is_none_alone(monkeypatch, function, keys, error):
    install(monkeypatch, Gpu(errors={function: error}))
    state = gpu_state(UUID)
    assert {key for key, value in state.items() if value is None} == keys


def test_a_function_that_pynvml_lacks_is_none_alone(monkeypatch):
    install(monkeypatch)
    monkeypatch.delitem(fake_nvml.ANSWERS, "nvmlDeviceGetMarginTemperature")
    state = gpu_state(UUID)
    assert {key for key, value in state.items() if value is None} == {"margin_c"}


def test_pages_are_asked_for_where_rows_are_not_replaced(monkeypatch):
    old = {"nvmlDeviceGetRemappedRows": "NOT_SUPPORTED"}
    install(monkeypatch, Gpu(rows_pending=True), Gpu(errors=old, pages_pending=True))
    assert [gpu_state(UUID)["rows_pending"] for _ in range(2)] == [True, True]


@pytest.mark.parametrize("error", ["GPU_IS_LOST", "UNKNOWN", "TIMEOUT", "UNINITIALIZED"])
def test_a_gpu_that_fails_is_recorded_as_such(monkeypatch, error):
    install(monkeypatch, Gpu(errors={"nvmlDeviceGetPowerUsage": error}))
    state = gpu_state(UUID)
    assert set(state) == {"monotonic_s", "uuid", "nvml_error"}
    assert state["nvml_error"]


def test_a_gpu_that_vanishes_and_one_that_comes_back(monkeypatch):
    fake = install(monkeypatch, Gpu(), Gpu(lost=True), Gpu(sm_mhz=1000))
    assert gpu_state(UUID)["sm_mhz"] == 1980
    assert gpu_state(UUID)["nvml_error"] == "GPU is lost"
    assert gpu_state(UUID)["sm_mhz"] == 1000
    assert fake.open == 2


@pytest.mark.parametrize("uuid", ["GPU-other", None])
def test_a_gpu_that_nvml_does_not_know_leaves_nothing_open(monkeypatch, uuid):
    fake = install(monkeypatch)
    assert gpu_state(uuid)["nvml_error"]
    assert fake.open == 0


@pytest.mark.parametrize("broken", [None, types.SimpleNamespace()])
def test_without_nvml_the_state_says_so(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert gpu_state(UUID)["nvml_error"]


def test_nvml_is_opened_once(monkeypatch):
    fake = install(monkeypatch)
    for _ in range(3):
        gpu_state(UUID)
    assert fake.open == 1


def test_a_fork_opens_nvml_for_itself(monkeypatch):
    fake = install(monkeypatch)
    gpu_state(UUID)
    monkeypatch.setattr(os, "getpid", lambda: PRESENT + 1)
    gpu_state(UUID)
    assert fake.open == 2


def test_names_of_a_mask():
    assert throttle_names(0x1FF) == list(THROTTLE_REASONS.values())[:9]
    assert throttle_names(0x8000) == ["0x8000"]
    assert throttle_names(0) == []
    assert throttle_names(None) is None
    assert set(THROTTLE_REASONS.values()) >= THROTTLING
    assert not THROTTLING & {"gpu_idle", "app_clocks", "sync_boost", "display_clocks"}


def test_the_run_and_its_processes_are_not_foreign(monkeypatch, processes):
    ours = tuple(map(Process, (RUN, SERVER, WORKER, SIBLING)))
    install(monkeypatch, Gpu(processes=(*ours, Process(SHELL), Process(FOREIGN, sm_percent=60))))
    state = gpu_state(UUID)
    assert state["processes"] == 6
    assert state["foreign"] == [
        {"pid": SHELL, "memory_bytes": 1 << 30, "sm_percent": 0},
        {"pid": FOREIGN, "memory_bytes": 1 << 30, "sm_percent": 60},
    ]
    assert (state["unplaced_pids"], state["host_pids"]) == ([], True)


def test_what_started_the_run_is_foreign_to_it(monkeypatch, processes):
    install(monkeypatch, *[Gpu(processes=(Process(RUN), Process(SHELL)))] * 2)
    monkeypatch.setattr(os, "getpid", lambda: RUN)
    assert [one["pid"] for one in gpu_state(UUID)["foreign"]] == [SHELL]
    (processes / str(SHELL) / "exe").unlink()
    (processes / str(SHELL) / "exe").symlink_to("/usr/bin/python3")  # so it might be of the run
    monkeypatch.setattr(os, "getpid", lambda: WORKER)  # but it is too far up
    assert [one["pid"] for one in gpu_state(UUID)["foreign"]] == [SHELL]


def test_a_run_may_be_named_to_processes_of_other_interpreters(monkeypatch, processes):
    """As a gate does, whose sides are environments of their own."""
    install(monkeypatch, *[Gpu(processes=(Process(RUN), Process(SIBLING)))] * 3)
    (processes / str(WORKER) / "exe").unlink()
    (processes / str(WORKER) / "exe").symlink_to("/opt/other/bin/python3")
    assert [one["pid"] for one in gpu_state(UUID)["foreign"]] == [RUN, SIBLING]
    monkeypatch.setenv(nvml.RUN, str(RUN))
    assert gpu_state(UUID)["foreign"] == []
    monkeypatch.setenv(nvml.RUN, str(FOREIGN))  # left over from elsewhere
    assert [one["pid"] for one in gpu_state(UUID)["foreign"]] == [RUN, SIBLING]


def test_on_the_host_a_process_that_cannot_be_seen_is_foreign(monkeypatch, processes):
    hidden = Process(9999, memory_bytes=None)
    install(monkeypatch, Gpu(processes=(Process(WORKER), hidden)))
    assert [one["pid"] for one in gpu_state(UUID)["foreign"]] == [9999]


def test_a_client_of_mps_is_listed_too(monkeypatch, processes):
    install(monkeypatch, Gpu(processes=(Process(FOREIGN, mps=True),)))
    assert [one["pid"] for one in gpu_state(UUID)["foreign"]] == [FOREIGN]


def test_in_a_container_pids_that_cannot_be_seen_are_anybodys(monkeypatch, processes):
    (processes / "self/ns/pid").unlink()
    (processes / "self/ns/pid").symlink_to("pid:[4026532999]")
    there = (Process(WORKER), Process(9999, sm_percent=9), Process(FOREIGN, sm_percent=9))
    install(monkeypatch, Gpu(processes=there))
    state = gpu_state(UUID)
    assert (state["unplaced_pids"], state["host_pids"]) == ([9999], False)
    # samples have the host's PIDs: they tell nothing of one of the container
    assert state["foreign"] == [{"pid": FOREIGN, "memory_bytes": 1 << 30, "sm_percent": None}]


@pytest.mark.parametrize(
    ("error", "percent"), [("NOT_FOUND", 0), ("NOT_SUPPORTED", None), ("NO_PERMISSION", None)]
)
def test_without_a_sample_nothing_was_used_and_without_rights_nothing_is_known(
    monkeypatch, processes, error, percent
):
    errors = {"nvmlDeviceGetProcessUtilization": error}
    install(monkeypatch, Gpu(processes=(Process(FOREIGN),), errors=errors))
    assert gpu_state(UUID)["foreign"][0]["sm_percent"] == percent


def test_a_gpu_that_lists_no_processes(monkeypatch):
    names = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses")
    install(monkeypatch, Gpu(errors=dict.fromkeys(names, "NOT_SUPPORTED")))
    state = gpu_state(UUID)
    keys = ("processes", "foreign", "unplaced_pids", "host_pids")
    assert [state[key] for key in keys] == [None] * 4


def test_this_process_and_its_children_are_of_this_run():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert nvml._descends(child.pid, nvml._run())
        assert nvml._descends(os.getpid(), nvml._run())
        assert not nvml._descends(1, nvml._run())
    finally:
        child.communicate(b"\n")


def test_the_fake_is_as_pynvml():
    import pynvml

    for name, value in fake_nvml.CONSTANTS.items():
        assert getattr(pynvml, name) == value, name
    for name in (*fake_nvml.ANSWERS, "nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByUUID"):
        assert callable(getattr(pynvml, name)), name
    for code, error in fake_nvml.ERRORS.items():
        assert type(pynvml.NVMLError(code)).__name__ == error.__name__
        assert type(fake_nvml.NVMLError(code)) is error
        assert str(pynvml.NVMLError(code)), error
    masks = {
        value
        for name in dir(pynvml)
        if name.startswith("nvmlClocksThrottleReason") and "All" not in name
        for value in [getattr(pynvml, name)]
    }
    assert {0x1, 0x4, 0x80} < masks <= {0, *THROTTLE_REASONS}


def test_processes_that_follow_one_another_play_one_script(tmp_path):
    script = (Gpu(), Gpu(processes=(Process(7),)), Gpu(reasons=0x40), Gpu(lost=True))
    module(tmp_path, *script)
    code = (
        "import json\n"
        "from bench.nvml import gpu_state\n"
        f"print(json.dumps([gpu_state({UUID!r}) for _ in range(2)]))"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    first, last = (
        json.loads(
            subprocess.check_output(
                [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}
            )
        )
        for _ in range(2)
    )
    assert [state["processes"] for state in first] == [0, 1]
    assert last[0]["throttle_names"] == ["hw_thermal"]
    assert last[1]["nvml_error"] == "GPU is lost"
    assert looks(tmp_path) == 4
