"""Tuned tables as files: round trips, what is refused, and which entry answers for an m."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from vqkernels import tuned_table
from vqkernels.device import Device
from vqkernels.errors import ContainerError
from vqkernels.kernel import registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tuned_table import Entry, Evidence, Pick, Table, TableDevice, load, stamp

DEVICE = TableDevice("cpu", "Test 9000", "x86_64-avx512", 8)
FAST = Pick("numba/table", "abc", Config(tokens=4, layout="rows", exact=True))
PLAIN = Pick("torch/dequant", "def", Config())
EVIDENCE = Evidence(ratio=1.42, low=1.31, pairs=7, made="2026-01-02T03:04:05+00:00", subject="5e")
PROBLEM = Problem(m=1, n=64, k=128, spec=PRESETS["aqlm-2x8"])


def entry(m: int = 1, chosen: Pick = FAST, **changes: Any) -> Entry:
    usual = Entry(
        spec=PROBLEM.spec,
        n=PROBLEM.n,
        k=PROBLEM.k,
        dtype="float32",
        m=m,
        chosen=FAST,
        default=PLAIN,
        versions={"torch": "2.13"},
        evidence=EVIDENCE,
    )
    return dataclasses.replace(usual, chosen=chosen, **changes)


def content(*entries: Entry) -> dict[str, Any]:
    return json.loads(json.dumps(Table(DEVICE, entries or (entry(),)).to_dict("a test")))


# ------------------------------------------------------------------------------------------------
# reading


def test_a_table_comes_back_whole(tmp_path: Path) -> None:
    coefficients = dataclasses.replace(PROBLEM.spec, coefficients=(1.0, 0.1 + 0.2))
    table = Table(
        DEVICE,
        (
            entry(),
            entry(m=4, chosen=PLAIN),
            entry(dtype="bfloat16", spec=coefficients),
            entry(spec=PRESETS["vptq-65536-256"], versions={"driver": "580.1", "triton": "3"}),
        ),
    )
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_dict("a test")))
    found = load(path)
    assert found == table
    assert type(found.entries[0].chosen.config["exact"]) is bool
    assert found.entries[0].spec is found.entries[1].spec, "parsed once"


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "isn't JSON"),
        (b'{"schema": 1', "isn't JSON"),
        (b"\xff\xfe\x00", "isn't JSON"),
        (b"[" * 100_000, "isn't JSON"),
        (b"1" * 10_000, "isn't JSON"),
        (b"[1]", "must have the fields schema"),
        (b"null", "must have the fields schema"),
        (b'{"schema": 2, "else": 1}', "has schema 2, this version reads 1; export it again"),
        (b'{"schema": true}', "must have the fields schema"),
    ],
)
def test_what_is_no_table_is_refused(data: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(data)
    with pytest.raises(ContainerError, match=word) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading one would wait for ever
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", tmp_path / ("x" * 300)):
        with pytest.raises(ContainerError, match=r"is no file|File name too long"):
            load(path)


def test_a_table_of_any_size_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content()))
    monkeypatch.setattr(tuned_table, "MOST_BYTES", path.stat().st_size)
    load(path)
    monkeypatch.setattr(tuned_table, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(ContainerError, match="more than any table"):
        load(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything in a JSON value is."""
    if not isinstance(value, dict | list):
        return []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(*path, name) for name, _ in items]
    return found + [inner for name, item in items for inner in places(item, (*path, name))]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = content()
    inside: Any = data
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    return data


ODD = (None, True, -1, 0, 2.5, float("nan"), float("inf"), 10**400, "", "\x1b[31m", "x" * 9999)
ODD += ([], [[1]], {}, {"a": None}, {"self": 1}, "caf\n", 2)


def read(data: dict[str, Any]) -> Table | str:
    try:
        return Table.from_dict(data)
    except ContainerError as error:
        return str(error)


def test_odd_values_anywhere_are_taken_or_refused_never_worse() -> None:
    refused = 0
    for path in places(content()):
        for value in ODD:
            table = read(changed(path, copy.deepcopy(value)))
            if isinstance(table, str):
                refused += 1
                assert "\n" not in table
                continue
            # what is taken is of the right types: it can be used, printed and written
            assert Table.from_dict(json.loads(json.dumps(table.to_dict("x")))) == table
            assert all(str(one).isprintable() for one in table.entries)
    assert refused > 500


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("device",), {"name": "x"}, "device must have the fields kind, name, arch, units"),
        (("device", "units"), True, "device: units must be of type int"),
        (("entries",), {}, "entries must be of type list"),
        (("entries", 0, "extra"), 1, "entry 0: an entry must have the fields"),
        (("entries", 0, "m"), 0, "the problem is none"),
        (("entries", 0, "n"), 1.0, "n must be of type int"),
        (("entries", 0, "dtype"), "float64", "the problem is none"),
        (("entries", 0, "spec", "stages"), [0], "a stage of 0 entries"),
        (("entries", 0, "spec", "coefficients"), [10**400, 1], "too large"),
        (("entries", 0, "spec", "colour"), 1, "unknown field 'colour'"),
        (("entries", 0, "chosen", "config", "tokens"), 4.0, "tokens must be a number, a text"),
        (("entries", 0, "chosen", "config", "tokens"), None, "tokens must be a number, a text"),
        (("entries", 0, "chosen", "config", "self"), 1, "a name that no parameter can have"),
        (("entries", 0, "chosen", "kernel"), "a\x1b[2J", "printable"),
        (("entries", 0, "chosen", "config", "a\nb"), 1, "printable"),
        (("entries", 0, "chosen", "config", "layout"), "\x1b[2J", "layout must be up to"),
        (("entries", 0, "default", "kernel"), "x" * 1001, "kernel must be up to 1000"),
        (("entries", 0, "versions", "torch"), 2, "printable"),
        (("entries", 0, "evidence", "made"), "yesterday", "a date with a zone"),
        (("entries", 0, "evidence", "made"), "2026-01-02T03:04:05", "a date with a zone"),
        (("entries", 0, "evidence", "ratio"), float("nan"), "between 0 and 1e9"),
        (("entries", 0, "evidence", "ratio"), -2, "between 0 and 1e9"),
        (("entries", 0, "evidence", "low"), 10**400, "between 0 and 1e9"),
        (("entries", 0, "evidence", "low"), 1, "no evidence that numba/table exact=True"),
        (("entries", 0, "evidence", "pairs"), 1, "no evidence"),
    ],
)
def test_each_wrong_field_is_named(path: tuple[Any, ...], value: Any, word: str) -> None:
    with pytest.raises(ContainerError, match=word):
        Table.from_dict(changed(path, value))


def test_two_entries_for_one_problem_are_refused() -> None:
    Table.from_dict(content(entry(), entry(m=2)))
    with pytest.raises(ContainerError, match="two entries for one problem"):
        Table.from_dict(content(entry(), entry(chosen=PLAIN)))


def test_a_default_needs_no_evidence() -> None:
    weak = dataclasses.replace(EVIDENCE, ratio=1.0, low=0.9, pairs=0)
    assert entry(chosen=PLAIN, evidence=weak).keeps_default
    with pytest.raises(ValueError, match="no evidence"):
        entry(evidence=weak)


# ------------------------------------------------------------------------------------------------
# asking


OTHER = Pick("numba/table", "abc", Config(tokens=8, layout="rows", exact=True))
LADDER = Table(
    DEVICE,
    (
        entry(m=32, chosen=PLAIN),
        *(entry(m=m) for m in (1, 4)),
        entry(m=8, chosen=OTHER),
        # the default changes with m; it stays at both
        entry(m=128, chosen=OTHER, default=OTHER),
    ),
)


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        (1, (1,)),
        (4, (4,)),
        (128, (128,)),
        (2, (1, 4)),
        (3, (1, 4)),
        (5, "m=5 lies between 4 and 8, which chose differently"),
        (31, "m=31 lies between 8 and 32, which chose differently"),
        (33, (32, 128)),
        (129, r"m=129 lies outside what was measured (1 to 128)"),
    ],
)
def test_neighbours_answer_where_they_agree(m: int, expected: Any) -> None:
    found = LADDER.around(dataclasses.replace(PROBLEM, m=m))
    assert (found if isinstance(found, str) else tuple(one.m for one in found)) == expected


def test_below_the_least_m_nothing_answers() -> None:
    table = Table(DEVICE, (entry(m=4), entry(m=8)))
    assert table.around(PROBLEM) == "m=1 lies outside what was measured (4 to 8)"


@pytest.mark.parametrize(
    "other",
    [
        {"n": 65},
        {"k": 256},
        {"dtype": "float16"},
        {"spec": PRESETS["rq-2x256x8"]},
        {"spec": dataclasses.replace(PROBLEM.spec, coefficients=(1.0, 2.0))},
    ],
)
def test_another_problem_has_no_entry(other: dict[str, Any]) -> None:
    assert LADDER.around(dataclasses.replace(PROBLEM, **other)) == ()


def test_a_bias_changes_nothing() -> None:
    assert LADDER.around(dataclasses.replace(PROBLEM, bias=True)) == LADDER.around(PROBLEM) != ()


def test_an_entry_says_what_it_rests_on() -> None:
    assert str(entry()) == "1.42x the default torch/dequant (>= 1.31), 7 pairs, 2026-01-02"
    assert str(entry(chosen=PLAIN)) == (
        "the default stays: the best other one is 1.42x (>= 1.31), 7 pairs, 2026-01-02"
    )
    untried = dataclasses.replace(EVIDENCE, pairs=0)
    assert "nothing was confirmed" in str(entry(chosen=PLAIN, evidence=untried))


# ------------------------------------------------------------------------------------------------
# stamps and names


def test_a_stamp_holds_what_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_table, "_version", lambda name: f"{name} 1")
    plain, device = registry()["torch/dequant"], Device(**DEVICES["cpu"])
    assert stamp((plain,), device) == {"torch": "torch 1"}
    numba = dataclasses.replace(plain, backend="numba")
    assert set(stamp((plain, numba), device)) == {"torch", "numba", "llvmlite"}
    gpu = Device(**DEVICES["cuda"], driver="580.1")
    triton = dataclasses.replace(plain, backend="triton")
    assert stamp((triton,), gpu) == {"torch": "torch 1", "triton": "triton 1", "driver": "580.1"}
    cuda = dataclasses.replace(plain, backend="cuda")
    assert set(stamp((cuda,), gpu)) == {"torch", "cuda-core", "nvidia-cuda-nvrtc", "driver"}
    assert stamp((plain,), Device(**DEVICES["cuda"]))["driver"] == "unknown"


DEVICES: dict[str, dict[str, Any]] = {
    kind: {"kind": kind, "name": "D", "arch": "a", "units": 1, "llc_bytes": 1, "memory_bytes": 1}
    for kind in ("cpu", "cuda")
}


def test_versions_are_the_installed_ones() -> None:
    assert tuned_table._version("torch").startswith("2.")
    assert tuned_table._version("no-such-package") == "none"


def test_a_device_names_its_file() -> None:
    assert DEVICE.slug == "test-9000-x86-64-avx512-8"
    assert len(dataclasses.replace(DEVICE, name="x y" * 200).slug) < 220
    assert str(DEVICE) == "Test 9000 x86_64-avx512, 8 threads"
    assert str(TableDevice("cuda", "H100", "sm_90", 132)) == "H100 sm_90, 132 multiprocessors"
