from __future__ import annotations

import dataclasses
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autotune.verdict import Comparison
from bench.gate import noise
from bench.gate.noise import Machine, Noise, load, measured, merge, place, save
from vqkernels.device import Device
from vqkernels.errors import ContainerError

CPU = Device(
    kind="cpu", name="Test CPU", arch="x86_64", units=2, llc_bytes=1 << 25, memory_bytes=1 << 34
)
GPU = dataclasses.replace(CPU, kind="cuda", name="Test GPU", arch="sm_90", driver="580.65")
CASE = {
    "workload": "toy",
    "layer": "q",
    "format": "vq-256x8",
    "m": 1,
    "dtype": "float32",
    "kernel": "numba/table",
    "versions": {"numba": "0.61"},
}


def same(*ratios: float) -> list[Comparison]:
    """Comparisons whose pairs all have one ratio, but for two that spread by 1 % up and down."""
    spread = (1.01, 1 / 1.01, 1.0, 1.0, 1.0)
    return [
        Comparison(name="x", pairs=tuple((1e-4, 1e-4 * ratio * by) for by in spread))
        for ratio in ratios
    ]


def case(*ratios: float, **fields) -> noise.CaseNoise:
    effects = {0.0: {"PASS": len(ratios)}, 0.05: {"REGRESSED": 3, "INCONCLUSIVE": 1}}
    return measured(same(*ratios), effects, **CASE | fields)


def known(**cases: noise.CaseNoise) -> Noise:
    return Noise(Machine.of(CPU), cases)


def assert_one_line(error, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VQBENCH_NOISE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_floor_and_spread() -> None:
    found = known(a=case(1.02, 1 / 1.02, 1.0, 1.0))
    rms = math.log(1.02) * math.sqrt(2 / 4)
    assert found.floor("a") == pytest.approx(math.exp(rms))
    # within each comparison, whatever its own ratio: variance 2 log(1.01)^2 / 4
    assert found.spread("a") == pytest.approx(math.log(1.01) / math.sqrt(2))
    assert (found.floor("unknown"), found.spread("unknown")) == (1.0, None)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load(None, CPU) is None
    found = known(a=case(1.02, 0.99))
    file = save(found)
    assert file.parent == tmp_path / "data" / "vqbench" / "noise"
    assert load(None, CPU) == found
    assert load(file, CPU) == found
    assert load(file.parent, CPU) == found
    content = json.loads(file.read_text())
    assert content["schema"] == noise.SCHEMA
    assert content["summary"] == found.summary()


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine.of(CPU)
    monkeypatch.setenv("VQBENCH_NOISE", str(tmp_path / "folder"))
    assert place(None, machine).parent == tmp_path / "folder"
    assert place(tmp_path / "mine.json", machine) == tmp_path / "mine.json"
    monkeypatch.setenv("VQBENCH_NOISE", str(tmp_path / "one.json"))
    assert place(None, machine) == tmp_path / "one.json"
    save(known(a=case(1.0, 1.01)))
    assert load(None, CPU) is not None


def test_a_later_selfcheck_adds_and_replaces() -> None:
    save(known(b=case(1.04), a=case(1.02)))
    save(known(a=case(1.01, 1.01), c=case(1.03)))
    found = load(None, CPU)
    assert found is not None
    assert list(found.cases) == ["a", "b", "c"]
    assert found.floor("a") == pytest.approx(1.01)
    assert found.cases["a"].comparisons == 2
    assert found.floor("b") == pytest.approx(1.04)


def test_savers_at_the_same_time_lose_nothing() -> None:
    names = [f"case {number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: save(known(**{name: case(1.01)})), names))
    found = load(None, CPU)
    assert found is not None
    assert sorted(found.cases) == names


def test_the_summary_is_over_all_cases() -> None:
    same_case, slowed = known(a=case(1.0, 1.0), b=case(1.0, 1.0, 1.0)).summary()
    assert (same_case["effect"], same_case["comparisons"], same_case["pass"]) == (0.0, 5, 1.0)
    assert same_case["regressed_high"] == pytest.approx(1 - 0.025 ** (1 / 5))
    assert (slowed["effect"], slowed["comparisons"], slowed["regressed"]) == (0.05, 8, 0.75)
    assert slowed["regressed_low"] < 0.75 < slowed["regressed_high"]


@pytest.mark.parametrize(
    "change",
    [{"name": "Other"}, {"arch": "sm_80"}, {"units": 3}, {"driver": "590.1"}, {"kind": "cpu"}],
)
def test_another_device_is_never_used(change, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(noise, "device_state", lambda device: {"power_limit_w": 700.0})
    other = dataclasses.replace(GPU, **change)
    file = save(Noise(Machine.of(GPU), {"a": case(1.02)}))
    assert load(None, GPU) is not None
    assert load(None, other) is None
    with pytest.raises(ContainerError) as error:
        load(file, other)
    assert_one_line(error, str(file), "was measured on Test GPU sm_90", "name another file")
    with pytest.raises(ContainerError, match="was measured on"):
        save(Noise(Machine.of(other), {}), file)
    assert load(file, GPU) is not None, "and what was there stays"


def test_another_power_limit_is_another_machine(monkeypatch) -> None:
    monkeypatch.setattr(noise, "device_state", lambda device: {"power_limit_w": 700.0})
    save(Noise(Machine.of(GPU), {"a": case(1.02)}))
    assert str(Machine.of(GPU)) == "Test GPU sm_90, 2 multiprocessors, driver 580.65, 700 W"
    monkeypatch.setattr(noise, "device_state", lambda device: {"power_limit_w": 400.0})
    assert load(None, GPU) is None
    monkeypatch.setattr(noise, "device_state", lambda device: {"nvml_error": "none"})
    assert load(None, GPU) is None
    assert Machine.of(GPU).power_limit_w is None


def test_merge_keeps_both_sides_as_they_were() -> None:
    old, new = known(a=case(1.02), b=case(1.03)), known(a=case(1.01))
    both = merge(old, new)
    assert both.cases == {"a": new.cases["a"], "b": old.cases["b"]}
    assert list(old.cases) == ["a", "b"]


def damaged(content: dict, path: str, value: object) -> str:
    """`content` with another value at `path`; `...` takes it away."""
    *folders, last = path.split("/")
    at = content
    for folder in folders:
        at = at[folder]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("schema", 2, "has schema 2, this version reads 1"),
        ("schema", "1", "schema can't be '1'"),
        ("machine", None, "machine can't be 'None'"),
        ("machine/units", True, "units can't be 'True'"),
        ("machine/driver", 5, "driver can't be '5'"),
        ("cases", [], "cases can't be '[]'"),
        ("cases/a", 3, "case 'a': has other fields"),
        ("cases/a/kernel", ..., "case 'a': has other fields"),
        ("cases/a/more", 1, "case 'a': has other fields"),
        ("cases/a/rms_log_ratio", float("nan"), "rms_log_ratio can't be 'nan'"),
        ("cases/a/rms_log_ratio", 1e999, "rms_log_ratio can't be 'inf'"),
        ("cases/a/pair_spread", -0.1, "pair_spread can't be '-0.1'"),
        ("cases/a/comparisons", 0, "at least 1"),
        ("cases/a/m", 1.0, "m can't be '1.0'"),
        ("cases/a/versions", {"numba": 1}, "versions: numba can't be '1'"),
        ("cases/a/effects", {"much": {}}, "has an effect 'much'"),
        ("cases/a/effects", {"0.05": 3}, "has an effect '0.05'"),
        ("cases/a/effects", {"0.05": {"GOOD": 3}}, "effect 0.05: has other fields"),
        ("cases/a/effects", {"0.05": {"PASS": -3}}, "effect 0.05: PASS can't be '-3'"),
    ],
)
def test_damage_is_one_line(path: str, value: object, word: str) -> None:
    file = save(known(a=case(1.02)))
    file.write_text(damaged(json.loads(file.read_text()), path, value))
    before = file.read_bytes()
    for use in (lambda: load(None, CPU), lambda: save(known(b=case(1.0)))):
        with pytest.raises(ContainerError) as error:
            use()
        assert_one_line(error, str(file), word, "move it away and run `vqbench selfcheck` again")
    assert file.read_bytes() == before, "it may be worth a look"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_what_is_no_noise_file(content: bytes) -> None:
    file = save(known(a=case(1.02)))
    file.write_bytes(content)
    with pytest.raises(ContainerError) as error:
        load(None, CPU)
    assert_one_line(error, str(file), "move it away")


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(ContainerError, match="is no file"):
        load(pipe, CPU)
    file = save(known(a=case(1.02)))
    monkeypatch.setattr(noise, "MOST_BYTES", 10)
    with pytest.raises(ContainerError, match="more than any selfcheck writes"):
        load(file, CPU)
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(ContainerError) as error:
        save(known(a=case(1.02)), blocked / "noise.json")
    assert_one_line(error, "choose another folder")
