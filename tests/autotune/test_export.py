"""Out of the store: what a verdict becomes, how tables are merged, and attempts as rows."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from autotune import export
from autotune import store as store_module
from autotune.export import attempt_rows, collect, conclude, flat_row, merge, write_table
from autotune.measurement import Correctness, Measurement
from autotune.store import Key, Store, subject_key
from autotune.verdict import Comparison, Judgement, judge
from vqkernels.device import Device
from vqkernels.errors import ContainerError
from vqkernels.kernel import Registry, registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tuned_table import Entry, Evidence, Pick, Table, TableDevice, load, stamp

DEVICE = Device(
    kind="cpu", name="Test", arch="x86_64", units=8, llc_bytes=1 << 20, memory_bytes=1 << 30
)
OTHER = dataclasses.replace(DEVICE, units=4)
PROBLEM = Problem(m=1, n=64, k=128, spec=PRESETS["rq-2x256x8"], dtype="float16", bias=True)
BASE = registry()["torch/dequant"]
FAST = dataclasses.replace(BASE, name="fast", backend="numba")
KERNELS = Registry({BASE.id: BASE, FAST.id: FAST}, {})
DEFAULT = Pick.of(BASE, Config())
WINNER = Pick.of(FAST, Config(tile=4, exact=True))


@dataclasses.dataclass(frozen=True)
class Found:
    winner: Pick = WINNER
    baseline: Pick = DEFAULT
    judgement: Judgement | None = None


def judged(ratio: float) -> Judgement:
    """Of a winner that takes `ratio` times as long as the default."""
    pairs = tuple((1e-3, 1e-3 * ratio * (1 + 0.001 * i)) for i in range(7))
    return judge([Comparison(name="x", pairs=pairs)])[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'tuning.sqlite'}")


def tell(store: Store, result: Found, number: int = 0, **options: Any) -> Entry:
    fields = {"problem": PROBLEM, "device": DEVICE, **options}
    subject = store.subject({"number": number})
    return conclude(store, subject, result=result, pairs=7, registry=KERNELS, **fields)


# ------------------------------------------------------------------------------------------------
# verdicts


def test_a_winner_that_is_faster_is_chosen(store: Store) -> None:
    entry = tell(store, Found(judgement=judged(0.5)))
    assert entry.chosen == WINNER
    assert entry.default == DEFAULT
    assert (entry.spec, entry.n, entry.k) == (PROBLEM.spec, 64, 128)
    assert (entry.dtype, entry.m) == ("float16", 1)
    assert entry.versions == stamp((FAST, BASE), DEVICE)
    found = entry.evidence
    assert found.ratio == pytest.approx(1 / (0.5 * 1.003))
    assert 1.98 < found.low < found.ratio
    assert found.pairs == 7
    assert found.store == store.url
    assert found.subject == subject_key({"number": 0})
    assert collect(store) == [Table(TableDevice.of(DEVICE), (entry,))]


@pytest.mark.parametrize(
    ("judgement", "pairs"), [(judged(0.985), 7), (judged(1.0), 7), (judged(2.0), 7), (None, 0)]
)
def test_else_the_default_stays(judgement: Judgement | None, pairs: int, store: Store) -> None:
    entry = tell(store, Found(judgement=judgement))
    assert entry.keeps_default
    assert entry.chosen == DEFAULT
    assert entry.versions == stamp((BASE,), DEVICE), "of what serves, and of nothing else"
    assert entry.evidence.pairs == pairs
    if judgement is None:
        assert entry.evidence.ratio == entry.evidence.low == 1
    else:
        assert entry.evidence.ratio == pytest.approx(1 / judgement.ratio)


def test_the_last_verdict_on_a_subject_counts(store: Store) -> None:
    tell(store, Found(judgement=judged(0.5)))
    tell(store, Found(judgement=judged(0.5)), 1, problem=dataclasses.replace(PROBLEM, m=8))
    tell(store, Found())
    (table,) = collect(store)
    assert [(one.m, one.keeps_default) for one in table.entries] == [(1, True), (8, False)]


def test_each_device_has_a_table(store: Store) -> None:
    tell(store, Found(judgement=judged(0.5)))
    tell(store, Found(), 1, device=OTHER)
    assert [table.device.units for table in collect(store)] == [8, 4]


def test_a_store_without_verdicts_has_no_tables(store: Store) -> None:
    assert collect(store) == []


def test_a_damaged_verdict_is_named(store: Store) -> None:
    tell(store, Found())
    with store._engine.begin() as run:
        run.execute(sa.update(store_module._VERDICTS).values(verdict={"schema": 0}))
    with pytest.raises(ContainerError, match=r"store sqlite.*: a verdict has schema 0.*tune again"):
        collect(store)


# ------------------------------------------------------------------------------------------------
# tables


def entry(m: int = 1, made: str = "2026-01-02T00:00:00+00:00", **changes: Any) -> Entry:
    usual = Entry(
        spec=PROBLEM.spec,
        n=64,
        k=128,
        dtype="float32",
        m=m,
        chosen=WINNER,
        default=DEFAULT,
        versions={"torch": "2"},
        evidence=Evidence(ratio=1.5, low=1.25, pairs=7, made=made, store="sqlite:////home/me/x"),
    )
    return dataclasses.replace(usual, **changes)


def table(*entries: Entry, device: Device = DEVICE) -> Table:
    return Table(TableDevice.of(device), entries)


def test_newer_entries_replace_older_ones() -> None:
    # an hour later, though its text sorts first
    newer = entry(made="2026-01-01T23:30:00-01:30", chosen=DEFAULT)
    for old, new in (([entry(), entry(2)], [newer]), ([newer, entry(2)], [entry()])):
        assert merge(old, table(*new)).entries == (newer, entry(2))
    again = entry(versions={"torch": "3"})
    assert merge([entry()], table(again)).entries == (again,), "of one moment, the one that comes"


def test_the_order_is_always_the_same() -> None:
    some = [entry(8), entry(2), entry(1, n=32), entry(1, spec=PRESETS["aqlm-2x8"])]
    assert merge(some, table()).entries == merge(some[::-1], table()).entries
    assert [one.m for one in merge([entry(16), entry(8)], table()).entries] == [8, 16]


def test_a_table_is_written_over_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "very" / "deep" / "t.json"
    write_table(table(entry(), entry(2)), path)
    later = entry(2, made="2026-02-02T00:00:00+00:00", chosen=DEFAULT)
    whole = write_table(table(later, entry(3)), path)
    assert whole.entries == (entry(), later, entry(3))
    assert load(path) == whole
    data = json.loads(path.read_text())
    assert data["made_by"].startswith("vqbench ")
    assert list(data) == sorted(data), "comparable as text"
    assert [one.name for one in path.parent.iterdir()] == ["t.json"]


def test_exports_at_the_same_time_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda m: write_table(table(entry(m)), path), range(1, 33)))
    assert [one.m for one in load(path).entries] == list(range(1, 33))


def test_what_is_no_table_of_this_device_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for data, word in (("{", "isn't JSON.*move it away"), ('{"schema": 2}', "schema 2")):
        path.write_text(data)
        with pytest.raises(ContainerError, match=rf"t\.json: .*{word}"):
            write_table(table(entry()), path)
        assert path.read_text() == data
    path.unlink()
    write_table(table(entry(), device=OTHER), path)
    with pytest.raises(ContainerError, match="is for Test x86_64, 4 threads; name another"):
        write_table(table(entry()), path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ContainerError, match="choose another folder"):
        write_table(table(entry()), tmp_path / "file" / "deep" / "t.json")


def test_a_table_for_others_names_no_place_of_ones_own() -> None:
    public = export.without_origin(table(entry()))
    assert public.entries[0].evidence.store == ""
    assert public.entries[0].evidence.ratio == 1.5


# ------------------------------------------------------------------------------------------------
# attempts


def test_attempts_as_rows(store: Store) -> None:
    right = Correctness(worst=0.5, max_abs=1e-6, relative_rms=1e-7, controls={"zeros": True})
    measured = Measurement(status="ok", samples_s=(1e-3, 3e-3, 2e-3), correctness=right)
    facts = {"problem": {"m": 1, "spec": {"stages": [256, 256]}}, "device": "cpu"}
    subject = store.subject(facts)
    store.finish(store.claim(subject, Key("a/b", "s", Config(tile=4))) or 0, measured)
    late = Measurement(status="timeout", reason="not done after 5 s")
    store.finish(store.claim(subject, Key("a/c", "s", Config(), 2)) or 0, late, "a log")
    store.claim(subject, Key("a/d", "s", Config()))
    first, second = attempt_rows(store)
    assert json.loads(json.dumps(first))["measurement"]["samples_s"] == [1e-3, 3e-3, 2e-3]
    assert (second["kernel"], second["round"], second["log"]) == ("a/c", 2, "a log")

    flat = flat_row(first)
    assert flat["subject"] == subject_key(facts)
    assert flat["facts.problem.m"] == 1
    assert flat["facts.problem.spec.stages"] == "[256, 256]"
    assert flat["config.tile"] == 4
    assert (flat["samples"], flat["median_s"], flat["spread"]) == (3, 2e-3, 0.25)
    assert flat["correctness.worst"] == 0.5
    assert not any(isinstance(value, dict | list | tuple) for value in flat.values())
    failed = flat_row(second)
    assert (failed["status"], failed["reason"]) == ("timeout", "not done after 5 s")
    assert (failed["samples"], failed["median_s"]) == (0, None)
