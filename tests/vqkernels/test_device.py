import dataclasses
import json
import os
import re
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkernels import device
from vqkernels.device import Device, detect, detect_cpu, detect_gpus, known_devices
from vqkernels.errors import BackendError


class NVMLError(Exception):
    pass


@pytest.fixture
def gpus(monkeypatch):
    """A machine with an H100 and a GPU that no table knows; the fake pynvml is returned."""
    names = ["NVIDIA Unheard-of 9000", b"NVIDIA H100 80GB HBM3"]
    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        opened=[],
        nvmlInit=lambda: fake.opened.append(True),
        nvmlShutdown=lambda: fake.opened.pop(),
        # NVML counts from the other end: what torch calls 0 must be found by its UUID
        nvmlDeviceGetHandleByUUID=lambda uuid: ["GPU-b", "GPU-a"].index(uuid),
        nvmlDeviceGetName=lambda handle: names[handle],
        nvmlDeviceGetCudaComputeCapability=lambda handle: [(12, 1), (9, 0)][handle],
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(total=85_520_809_984),
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: types.SimpleNamespace(
            multi_processor_count=77, L2_cache_size=50 << 20, uuid="ab"[index]
        ),
    )
    return fake


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_is_what_nvml_tells_and_the_table_adds(gpus):
    first = detect("cuda")
    facts = known_devices()["h100-sxm"]
    assert (first.kind, first.index, first.name) == ("cuda", 0, "NVIDIA H100 80GB HBM3")
    assert (first.arch, first.uuid, first.driver) == ("sm_90", "GPU-a", "580.65.06")
    assert first.memory_bytes == 85_520_809_984
    assert (first.units, first.llc_bytes) == (77, 50 << 20)
    assert (first.bandwidth, first.flops) == (facts["bandwidth"], facts["flops"])
    assert first.shared_bytes == facts["shared_bytes"]
    assert gpus.opened == []  # shut down again


def test_rates_of_an_unknown_gpu_are_not_invented(gpus):
    second = detect("cuda:1")
    assert (second.index, second.arch, second.units) == (1, "sm_121", 77)
    assert (second.bandwidth, second.flops, second.shared_bytes) == (None, {}, None)


def test_the_first_gpu_is_taken_unasked(gpus):
    assert detect() == detect("auto") == detect("cuda") == detect("cuda:0") == detect_gpus()[0]


def test_without_a_gpu_the_cpu_is_taken(no_gpu):
    assert detect() == detect_cpu()
    assert detect_gpus() == []


def test_a_device_has_the_name_that_torch_knows(gpus):
    assert [one.torch_name for one in detect_gpus()] == ["cuda:0", "cuda:1"]
    assert detect("cpu").torch_name == "cpu"


def test_the_cpu_is_there_beside_gpus(gpus):
    assert detect("cpu").kind == "cpu"


@pytest.mark.parametrize(
    ("call", "open_after"),
    [("nvmlInit", []), ("nvmlDeviceGetHandleByUUID", []), ("nvmlDeviceGetName", [])],
)
def test_an_nvml_error_means_no_gpu_and_no_open_handle(gpus, monkeypatch, call, open_after):
    def fail(*_):
        raise NVMLError("driver/library version mismatch")

    monkeypatch.setattr(gpus, call, fail)
    assert detect_gpus() == []
    assert gpus.opened == open_after
    assert detect().kind == "cpu"


def test_without_pynvml_there_is_no_gpu(gpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert detect_gpus() == []


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["gpu", "", "CPU", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps"])
def test_an_unknown_device_is_one_line(no_gpu, kind):
    with pytest.raises(BackendError) as error:
        detect(kind)
    assert f"{kind!r} is unknown; use cpu, cuda, cuda:N or auto" in one_line(error)


@pytest.mark.parametrize("kind", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_one_line(no_gpu, kind):
    with pytest.raises(BackendError) as error:
        detect(kind)
    assert f"device {kind}: 0 NVIDIA GPU(s) answer here" in one_line(error)


def test_an_index_beyond_the_last_gpu_is_one_line(gpus):
    with pytest.raises(BackendError, match=r"cuda:2: 2 NVIDIA GPU\(s\)"):
        detect("cuda:2")


def test_this_machines_cpu_is_plausible():
    cpu = detect_cpu()
    assert cpu.kind == "cpu"
    assert cpu.name
    assert re.fullmatch(r"(x86_64|aarch64|arm64)(-avx2|-avx512)?", cpu.arch)
    assert 1 <= cpu.units <= (os.cpu_count() or 1)
    assert 1 << 18 <= cpu.llc_bytes <= 1 << 32
    assert 1 << 28 <= cpu.memory_bytes <= 1 << 46
    for size in (cpu.l1_bytes, cpu.l2_bytes):
        assert size is None or 1 << 12 <= size <= cpu.llc_bytes
    assert (cpu.bandwidth, cpu.flops) == (None, {})


def test_threads_are_those_that_may_run_here(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 6})
    assert detect_cpu().units == 3
    assert detect_cpu(threads=2).units == 2


def test_a_system_that_tells_nothing_still_has_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_SYSTEM_CACHES", tmp_path)
    monkeypatch.setattr(device, "_cpuinfo", dict)
    cpu = detect_cpu()
    assert cpu.name
    assert cpu.llc_bytes == 32 << 20
    assert cpu.l1_bytes is None


def test_caches_are_read_by_level_and_kind(monkeypatch, tmp_path):
    facts = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K")]
    facts += [("3", "Unified", "96M"), ("x", "Unified", "1K")]
    for number, values in enumerate(facts):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n", encoding="ascii")
    monkeypatch.setattr(device, "_SYSTEM_CACHES", tmp_path)
    cpu = detect_cpu()
    assert (cpu.l1_bytes, cpu.l2_bytes, cpu.llc_bytes) == (48 << 10, 2 << 20, 96 << 20)


@pytest.mark.parametrize(
    ("flags", "end"), [("sse avx2 avx512f", "-avx512"), ("sse avx2", "-avx2"), ("neon", "")]
)
def test_the_widest_vectors_are_named(monkeypatch, flags, end):
    monkeypatch.setattr(device, "_cpuinfo", lambda: {"model name": "CPU", "flags": flags})
    assert detect_cpu().arch.endswith(end)
    assert detect_cpu().arch.count("avx") == bool(end)


def make(**fields) -> Device:
    sizes = {"units": 1, "llc_bytes": 1, "memory_bytes": 1}
    return Device(**{"kind": "cpu", "name": "A", "arch": "x86_64"} | sizes | fields)


@given(st.text(max_size=30))
def test_a_slug_is_a_plain_folder_name(name):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", make(name=name).slug)


def test_a_known_slug():
    name = "Intel(R) Xeon(R)  @ 2.20GHz"
    assert make(name=name, arch="x86_64-avx2").slug == "intel-r-xeon-r-2-20ghz-x86-64-avx2"


def test_a_device_is_ready_for_a_record(gpus):
    fields = json.loads(json.dumps(detect("cuda").to_dict()))
    assert Device(**fields) == detect("cuda")


def test_a_device_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().units = 2


TABLES = known_devices()


@pytest.mark.parametrize("name", TABLES)
def test_a_device_table_is_well_formed(name):
    table = dict(TABLES[name])
    assert re.compile(table.pop("match"))
    flops, unit, rates = (table.pop(key) for key in ("flops", "multiprocessor", "rates"))
    assert re.search(TABLES[name]["match"], table.pop("name"))
    assert re.fullmatch(r"sm_\d+", table.pop("arch"))
    assert set(flops) <= {"float32", "float16", "bfloat16", "int8", "float8"}
    sizes = {"multiprocessors", "l2_bytes", "shared_bytes", "memory_bytes"}
    assert set(table) == {*sizes, "bandwidth"}
    assert all(isinstance(table[key], int) for key in sizes)
    check_rates(table, unit, rates)
    assert all(value > 0 for value in [*table.values(), *flops.values()])
    assert 1e11 < table["bandwidth"] < 1e14
    assert all(1e12 < rate < 1e17 for rate in flops.values())


def check_rates(table, unit, rates):
    sizes = {"l1_bytes", "shared_bytes", "threads", "blocks", "registers"}
    assert set(unit) == {*sizes, "issue_slots", "wavefront_bytes"}
    assert all(isinstance(value, int) and value > 0 for value in unit.values())
    # a block's limit is what a multiprocessor has but for the system's 1 KB, and L1 holds both
    assert table["shared_bytes"] + 1024 == unit["shared_bytes"] < unit["l1_bytes"]
    latencies = [rates[f"{name}_latency_clocks"] for name in ("l1", "l2", "memory")]
    assert latencies == sorted(latencies)
    assert all(10 < clocks < 2000 for clocks in latencies)
    assert set(rates) - {f"{name}_latency_clocks" for name in ("l1", "l2", "memory")} == {
        "clock_hz",
        "l2_bandwidth",
        "launch_s",
    }
    assert 1e9 < rates["clock_hz"] < 4e9
    assert table["bandwidth"] < rates["l2_bandwidth"]
    # no faster than 64 bytes a clock into each multiprocessor
    assert rates["l2_bandwidth"] < 64 * rates["clock_hz"] * table["multiprocessors"]
    assert 1e-7 < rates["launch_s"] < 1e-5


@pytest.mark.parametrize("name", TABLES)
def test_a_known_device_is_what_its_table_says(name):
    found, table = device.known_device(name), TABLES[name]
    assert (found.kind, found.units, found.name) == (
        "cuda",
        table["multiprocessors"],
        table["name"],
    )
    assert found.rates == table["rates"]
    assert found.multiprocessor == table["multiprocessor"]
    assert found.bandwidth == table["bandwidth"]
    assert Device(**json.loads(json.dumps(found.to_dict()))) == found


def test_a_known_device_by_a_part_of_its_name():
    assert device.known_device("h100") == device.known_device("h100-sxm")
    assert device.known_device("4090").arch == "sm_89"
    with pytest.raises(BackendError, match="names several of the known ones; use one of a100-sxm"):
        device.known_device("0")
    with pytest.raises(BackendError, match=r"names none of the known ones; use one of .*h200"):
        device.known_device("v100")


def test_a_whole_name_goes_before_parts(monkeypatch):
    tables = {name: {**TABLES["h200"], "name": name} for name in ("h200-nvl", "h200", "gh200")}
    monkeypatch.setattr(device, "known_devices", lambda: tables)
    assert device.known_device("h200").name == "h200"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_a_gpu_matches_its_own_table_only(name, table):
    found = [key for key, facts in TABLES.items() if re.search(facts["match"], name)]
    assert found == ([table] if table else [])
