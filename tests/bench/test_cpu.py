import json
import os
import time
import types

import pytest

from bench import cpu
from bench.cpu import cpu_state

STAT = """cpu  900 900 900 900 900 900 900 900 900 900
cpu0 1 2 4 8 16 32 64 128 1 1
cpu1 100 200 400 800 1600 3200 6400 12800 100 100
cpu2 9000 9000 9000 9000 9000 9000 9000 9000 9000 9000
intr 1 2
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One with three CPUs of which two are ours, as files in a folder."""
    files = {
        "proc/stat": STAT,
        "proc/self/status": "Name:\tpython: x\nCpus_allowed_list:\t0-1\n",
        "proc/pressure/cpu": "some avg10=0.30 total=7256474\nfull avg10=0.00 total=1\n",
        **{f"sys/cpu{n}/cpufreq/scaling_governor": "powersave\n" for n in range(2)},
        "sys/cpu0/cpufreq/scaling_cur_freq": "3100000\n",
        **{f"sys/cpu{n}/thermal_throttle/core_throttle_count": f"{n + 1}\n" for n in range(3)},
        **{f"sys/cpu{n}/thermal_throttle/package_throttle_count": "10\n" for n in range(3)},
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpu, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(cpu, "_SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 0})
    return tmp_path


def test_a_state_is_of_the_cpus_that_may_be_used(machine):
    state = cpu_state()
    assert state["cpus"] == "0-1"
    assert state["governor"] == "powersave"
    assert state["mhz"] == 3100.0
    assert state["busy_ticks"] == 1 + 2 + 4 + 32 + 64 + 100 + 200 + 400 + 3200 + 6400
    assert state["idle_ticks"] == 8 + 16 + 800 + 1600
    assert state["steal_ticks"] == 128 + 12800
    assert state["thermal_throttles"] == 1 + 10 + 2 + 10
    assert state["pressure_s"] == 7.256474


def test_governors_that_differ_are_all_named(machine):
    (machine / "sys/cpu1/cpufreq/scaling_governor").write_text("performance\n")
    assert cpu_state()["governor"] == "performance and powersave"


@pytest.mark.parametrize("text", [None, "", "cpu0 a b\n", "cpu0 1 2\n", "cpu7 1 2 3 4 5 6 7 8\n"])
def test_what_a_machine_does_not_tell_is_none(machine, text):
    if text is None:
        for file in machine.rglob("*"):
            if file.is_file():
                file.unlink()
    else:
        (machine / "proc/stat").write_text(text)
    state = cpu_state()
    assert [state[f"{kind}_ticks"] for kind in ("busy", "idle", "steal")] == [None] * 3
    if text is None:
        known = {name for name, value in state.items() if value is not None}
        assert known == {"monotonic_s", "load_1m", "own_cpu_s"}


def test_a_file_that_is_not_as_we_know_it_is_unknown(machine):
    (machine / "proc/self/status").write_text("no colon\n")
    (machine / "proc/pressure/cpu").write_text("")
    (machine / "sys/cpu0/cpufreq/scaling_cur_freq").write_text("<unknown>\n")
    (machine / "sys/cpu0/thermal_throttle/core_throttle_count").write_text("-\n")
    state = cpu_state()
    assert state["cpus"] is state["pressure_s"] is state["mhz"] is None
    assert state["thermal_throttles"] == 10 + 2 + 10


def test_own_time_is_of_this_process_and_its_children(monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 1.5)
    used = types.SimpleNamespace(ru_utime=2.0, ru_stime=0.25)
    monkeypatch.setattr(cpu.resource, "getrusage", {cpu.resource.RUSAGE_CHILDREN: used}.get)
    assert cpu_state()["own_cpu_s"] == 3.75


def test_this_machine_has_a_state_for_a_record():
    state = cpu_state()
    assert state["busy_ticks"] > 0
    assert json.loads(json.dumps(state, allow_nan=False)) == state
