import dataclasses
import json
import subprocess
import types
from pathlib import Path

import pytest

from bench import environment
from bench.environment import describe_host, device_state, project_revision
from tests.autotune.zoo import DEVICE

GPU = dataclasses.replace(DEVICE, kind="cuda", index=1, uuid="GPU-b")


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("1", encoding="utf-8")
    git(tmp_path, "init")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    return tmp_path


def test_a_clean_checkout_has_a_commit(checkout):
    revision = project_revision()
    assert len(revision["commit"]) == 40
    assert revision["dirty"] is False


def test_a_changed_file_makes_it_dirty_and_a_new_one_does_not(checkout):
    (checkout / "results.jsonl").write_text("{}", encoding="utf-8")
    assert project_revision()["dirty"] is False
    (checkout / "code.py").write_text("2", encoding="utf-8")
    assert project_revision()["dirty"] is True


def test_outside_a_checkout_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert project_revision() == {"commit": None, "dirty": None}


def test_another_projects_commit_is_not_ours(checkout, monkeypatch):
    installed = checkout / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(environment, "_ROOT", installed)
    assert project_revision() == {"commit": None, "dirty": None}


def test_without_git_nothing_is_claimed(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert project_revision() == {"commit": None, "dirty": None}


def test_the_head_of_a_record_says_where_it_ran():
    host = describe_host(DEVICE)
    assert host["host"]
    assert "Linux" in host["system"]
    assert host["device"] == DEVICE.to_dict()
    assert {"python", "torch", "numpy"} <= set(host["versions"])
    assert set(host["project"]) == {"commit", "dirty"}
    assert json.loads(json.dumps(host, allow_nan=False)) == host


def test_the_state_of_a_cpu():
    state = device_state(DEVICE)
    assert set(state) == {"load_1m", "steal_ticks", "governor", "mhz"}
    assert state["load_1m"] >= 0
    assert state["steal_ticks"] is None or state["steal_ticks"] >= 0
    assert json.dumps(state)


def test_steal_is_the_eighth_figure(monkeypatch):
    lines = "cpu  1 2 3 4 5 6 7 88 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1"
    monkeypatch.setattr(environment, "_read", lambda path: lines)
    assert device_state(DEVICE)["steal_ticks"] == 88
    monkeypatch.setattr(environment, "_read", lambda path: None)
    assert device_state(DEVICE)["steal_ticks"] is None


@pytest.fixture
def nvml(monkeypatch):
    """A fake pynvml that answers for that GPU only."""

    class NVMLError(Exception):
        pass

    def handle(uuid):
        if uuid != GPU.uuid:
            raise NVMLError("no such GPU")
        return "handle"

    answers = {
        "nvmlDeviceGetClockInfo": lambda handle, kind: {"sm": 1980, "mem": 2619}[kind],
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 4,
        "nvmlDeviceGetPowerUsage": lambda handle: 123_456,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": lambda handle, kind: 41,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [object()] * 2,
    }
    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="mem",
        NVML_TEMPERATURE_GPU="gpu",
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        **answers,
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    return fake


def test_the_state_of_a_gpu_in_watts_and_megahertz(nvml):
    assert device_state(GPU) == {
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "throttle_reasons": 4,
        "power_w": 123.456,
        "power_limit_w": 700.0,
        "temperature_c": 41,
        "processes": 2,
    }


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetPowerUsage"])
def test_a_gpu_that_does_not_answer_is_recorded_as_such(nvml, monkeypatch, call):
    def fail(*_):
        raise nvml.NVMLError("GPU is lost")

    monkeypatch.setattr(nvml, call, fail)
    assert device_state(GPU) == {"nvml_error": "GPU is lost"}
