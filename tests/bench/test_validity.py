import json
from pathlib import Path

import pytest

from bench import validity
from bench.nvml import _open, gpu_state
from bench.validity import changed, doubts, forbids
from tests.bench.fake_nvml import UUID, Gpu, Process, install

QUIET = {
    "monotonic_s": 100.0,
    "cpus": "0-1",
    "governor": "performance",
    "busy_ticks": 1000,
    "idle_ticks": 5000,
    "steal_ticks": 10,
    "own_cpu_s": 3.0,
    "thermal_throttles": 7,
}


def later(**rises):
    """A second after QUIET: by default the two CPUs were used by this process alone."""
    rises = {"monotonic_s": 1.0, "busy_ticks": 150, "idle_ticks": 50, "own_cpu_s": 1.5} | rises
    return QUIET | {key: QUIET[key] + rise for key, rise in rises.items()}


@pytest.fixture
def gpu(monkeypatch):
    """The states of a script of GPUs, a tenth of a second apart."""

    def look(*script):
        _open.cache_clear()
        install(monkeypatch, *script)
        now = iter(range(99))
        return [gpu_state(UUID) | {"monotonic_s": next(now) / 10} for _ in script]

    yield look
    _open.cache_clear()


def test_a_healthy_gpu_gives_no_reason(gpu):
    states = gpu(Gpu(), Gpu(temperature_c=60, sm_mhz=1965, power_w=600))
    assert forbids(*states) == doubts(*states) == changed(states) == ()


def test_a_quiet_cpu_gives_no_reason():
    assert forbids(QUIET, later()) == doubts(QUIET, later()) == changed([QUIET, later()]) == ()


FORBIDDEN = {
    "counter": (Gpu(), Gpu(thermal_s=0.012), "GPU throttled: thermal for 12 ms of 100 ms"),
    "power": (Gpu(power_s=7), Gpu(power_s=7.05), "GPU throttled: power for 50 ms of 100 ms"),
    "board": (Gpu(), Gpu(board_s=0.05), "GPU throttled: board limit for 50 ms of 100 ms"),
    "start": (Gpu(reasons=0x40), Gpu(), "GPU throttled at the start: hw_thermal"),
    "end": (Gpu(), Gpu(reasons=0xA5), "GPU throttled at the end: sw_power_cap, sw_thermal, "),
    "foreign": (
        Gpu(),
        Gpu(processes=(Process(1, sm_percent=40),)),
        "another process computed on the GPU: pid 1, 40 % of it",
    ),
    "gone": (
        Gpu(processes=(Process(1, sm_percent=40),)),
        Gpu(),
        "another process computed on the GPU: pid 1, 40 % of it",
    ),
    "now idle": (
        Gpu(processes=(Process(1, sm_percent=40),)),
        Gpu(processes=(Process(1, sm_percent=0),)),
        "another process computed on the GPU: pid 1, 40 % of it",
    ),
    "now busy": (
        Gpu(processes=(Process(1, sm_percent=0),)),
        Gpu(processes=(Process(1, sm_percent=40),)),
        "another process computed on the GPU: pid 1, 40 % of it",
    ),
    "unmeasured": (
        Gpu(),
        Gpu(processes=(Process(1),), errors={"nvmlDeviceGetProcessUtilization": "NO_PERMISSION"}),
        "another process is on the GPU: pid 1",
    ),
    "ecc": (
        Gpu(ecc_volatile=1, ecc_aggregate=4),
        Gpu(ecc_volatile=3, ecc_aggregate=5),
        "2 uncorrected errors of the GPU's memory",
    ),
    "ecc ever": (
        Gpu(ecc_aggregate=4),
        Gpu(ecc_aggregate=5),
        "1 uncorrected errors of the GPU's memory",
    ),
    "lost": (Gpu(), Gpu(lost=True), "the GPU stopped answering: GPU is lost"),
    "was lost": (Gpu(lost=True), Gpu(lost=True), "the GPU didn't answer: GPU is lost"),
    "limit": (Gpu(), Gpu(limit_w=400), "power limit changed: 700 W to 400 W"),
    "mig": (Gpu(), Gpu(mig=True), "MIG mode changed: off to on"),
    "ecc mode": (Gpu(), Gpu(ecc=False), "ECC mode changed: on to off"),
    "persistence": (
        Gpu(persistence=False),
        Gpu(),
        "persistence mode changed: off to on",
    ),
    "clock": (Gpu(), Gpu(sm_mhz=1700), "the SM clock fell without a reason: 1980 to 1700 MHz"),
}


@pytest.mark.parametrize(("before", "after", "reason"), FORBIDDEN.values(), ids=list(FORBIDDEN))
def test_what_forbids_a_verdict(gpu, monkeypatch, before, after, reason):
    monkeypatch.setattr("bench.nvml._sees_host_pids", lambda: True)
    (found,) = forbids(*gpu(before, after))
    assert found.startswith(reason)


@pytest.mark.parametrize("bits", [0x1, 0x2, 0x10, 0x100, 0x400, 0])
def test_what_is_no_throttling_forbids_nothing(gpu, bits):
    assert forbids(*gpu(Gpu(reasons=bits), Gpu(reasons=bits))) == ()


def test_a_throttle_too_short_to_matter_forbids_nothing(gpu):
    assert forbids(*gpu(Gpu(power_s=1), Gpu(power_s=1.0009))) == ()
    assert forbids(*gpu(Gpu(power_s=1), Gpu(power_s=1.0011))) != ()


def test_counters_that_began_anew_say_nothing(gpu):
    before, after = Gpu(power_s=9, ecc_volatile=5, ecc_aggregate=5), Gpu(ecc_aggregate=5)
    assert forbids(*gpu(before, after)) == ()


def test_a_clock_that_fell_for_a_reason_or_in_an_idle_gpu_is_not_counted_twice(gpu):
    throttled = gpu(Gpu(), Gpu(sm_mhz=1000, reasons=0x20))
    assert forbids(*throttled) == ("GPU throttled at the end: sw_thermal",)
    assert doubts(*gpu(Gpu(), Gpu(sm_mhz=1000))) == ()  # it is forbidden
    for script in ((Gpu(), Gpu(sm_mhz=345, reasons=1)), (Gpu(reasons=1), Gpu(sm_mhz=345))):
        states = gpu(*script)
        assert forbids(*states) == doubts(*states) == ()


DOUBTFUL = {
    "hot": (Gpu(), Gpu(margin_c=5), "the GPU is 5 degrees from being slowed down for heat"),
    "hot, of old": (
        Gpu(),
        Gpu(temperature_c=85, errors={"nvmlDeviceGetMarginTemperature": "NOT_SUPPORTED"}),
        "the GPU is 2 degrees from being slowed down for heat",
    ),
    "holder": (
        Gpu(),
        Gpu(processes=(Process(1, memory_bytes=5 * 10**9, sm_percent=0),)),
        "another process holds 5.0 GB of the GPU: pid 1",
    ),
    "holder of unknown": (
        Gpu(processes=(Process(1, memory_bytes=None, sm_percent=0),)),
        Gpu(),
        "another process holds memory of the GPU: pid 1",
    ),
    "persistence": (
        Gpu(persistence=False),
        Gpu(persistence=False),
        "persistence mode of the GPU is off",
    ),
    "slower": (Gpu(), Gpu(sm_mhz=1905), "the SM clock moved: 1980 to 1905 MHz"),
    "faster": (Gpu(sm_mhz=1200), Gpu(), "the SM clock moved: 1200 to 1980 MHz"),
    "ecc": (
        Gpu(ecc_volatile=2),
        Gpu(ecc_volatile=2),
        "2 uncorrected errors of the GPU's memory before",
    ),
    "rows": (
        Gpu(),
        Gpu(rows_pending=True),
        "memory of the GPU waits to be replaced: it needs a reset",
    ),
}


@pytest.mark.parametrize(("before", "after", "reason"), DOUBTFUL.values(), ids=list(DOUBTFUL))
def test_what_is_odd_and_forbids_nothing(gpu, monkeypatch, before, after, reason):
    monkeypatch.setattr("bench.nvml._sees_host_pids", lambda: True)
    states = gpu(before, after)
    assert doubts(*states) == (reason,)
    assert forbids(*states) == ()


def test_in_a_container_one_process_is_this_one_and_two_may_be_others(gpu, monkeypatch):
    monkeypatch.setattr("bench.nvml._sees_host_pids", lambda: False)
    hidden = (Process(4_194_305), Process(4_194_306))  # beyond the kernel's highest PID
    states = gpu(Gpu(processes=hidden[:1]), Gpu(processes=hidden))
    assert forbids(*states) == ()
    (reason,) = doubts(*states)
    assert reason.startswith("2 processes on the GPU may be others'")
    assert doubts(states[0], states[0]) == ()


@pytest.mark.parametrize(
    ("rises", "reason"),
    [
        ({"busy_ticks": 150, "own_cpu_s": 0.6}, "others used 45 % of the CPUs"),
        ({"busy_ticks": 150, "own_cpu_s": 1.28}, "others used 11 % of the CPUs"),
        ({"steal_ticks": 10}, "the hypervisor took 5 % of the CPUs"),
        ({"thermal_throttles": 2}, "CPUs were slowed down for heat 2 times"),
    ],
)
def test_what_is_odd_of_a_cpu(rises, reason):
    assert doubts(QUIET, later(**rises)) == (reason,)
    assert forbids(QUIET, later(**rises)) == ()


@pytest.mark.parametrize(
    "rises",
    [
        {"own_cpu_s": 1.32},  # 9 %
        {"steal_ticks": 4},  # 2 %
        {"busy_ticks": 10, "idle_ticks": 5, "own_cpu_s": 0.01},  # too short to say
        {"own_cpu_s": -1.0},  # of another process
    ],
)
def test_what_is_not_odd_of_a_cpu(rises):
    assert doubts(QUIET, later(**rises)) == ()


def test_a_governor_that_lets_clocks_vary_is_odd():
    slow = QUIET | {"governor": "powersave"}
    assert doubts(slow, slow) == ("the CPUs' governor is powersave, not performance",)
    assert changed([QUIET, slow, slow]) == ("governor changed: performance to powersave",)


def test_what_a_session_did_not_keep(gpu):
    states = gpu(Gpu(), Gpu(limit_w=350.5), Gpu(limit_w=350.5), Gpu(), Gpu(mig=True))
    states[-1] = states[-1] | {"uuid": "GPU-c", "driver": "590.2"}
    assert changed(states) == (
        "GPU changed: GPU-b to GPU-c",
        "driver changed: 580.1 to 590.2",
        "power limit changed: 700 W to 350.5 W to 700 W",
        "MIG mode changed: off to on",
    )
    assert changed([]) == changed(states[:1]) == ()
    assert changed([QUIET, QUIET | {"cpus": "0"}]) == ("set of CPUs changed: 0-1 to 0",)


def test_a_gap_in_a_session_is_no_change(gpu):
    states = gpu(Gpu(), Gpu(lost=True), Gpu(errors={"nvmlDeviceGetMigMode": "NOT_SUPPORTED"}))
    assert changed(states) == ()


OLD_CPU = [
    {"load_1m": 1.5, "steal_ticks": 10, "governor": None, "mhz": None},
    {"load_1m": 1.5, "steal_ticks": 500, "governor": None, "mhz": "3100000"},
]
OLD_GPU = {
    "sm_mhz": 1980,
    "memory_mhz": 2619,
    "throttle_reasons": 0,
    "power_w": 123.456,
    "power_limit_w": 700.0,
    "temperature_c": 41,
    "processes": 2,
}


def test_states_of_older_records_are_judged_by_what_they_have():
    for pair in (OLD_CPU, [OLD_GPU, OLD_GPU], [{}, {}]):
        assert forbids(*pair) == doubts(*pair) == changed(pair) == ()
    capped = OLD_GPU | {"throttle_reasons": 4, "power_limit_w": 400.0}
    assert forbids(OLD_GPU, capped) == (
        "GPU throttled at the end: sw_power_cap",
        "power limit changed: 700 W to 400 W",
    )
    assert forbids(OLD_GPU, {"nvml_error": "x"}) == ("the GPU stopped answering: x",)


def test_no_key_is_needed(gpu):
    users = Gpu(processes=(Process(1),), thermal_s=1)
    pairs = [gpu(users, users), [QUIET, later()]]
    for first, last in pairs:
        for key in first:
            lacking = {name: value for name, value in first.items() if name != key}
            for gap in (lacking, first | {key: None}):
                for pair in ((gap, last), (first, gap), (gap, gap)):
                    found = forbids(*pair) + doubts(*pair) + changed(pair)
                    assert all(isinstance(reason, str) for reason in found)


def test_the_records_that_are_kept_can_be_judged():
    (path,) = (Path(validity.__file__).parents[1] / "results").glob("*/20261121T230738-run.jsonl")
    states = [json.loads(line)["state"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(states) == 488
    assert not any(forbids(**state) or doubts(**state) for state in states)
