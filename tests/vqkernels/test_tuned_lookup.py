"""Which tuned table answers, and that nothing which has changed is believed."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vqkernels import tuned_lookup
from vqkernels.device import Device
from vqkernels.errors import BackendError
from vqkernels.kernel import Kernel, Registry, registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.tuned_lookup import Answer, TunedTableWarning, find, places, set_explicit
from vqkernels.tuned_table import Entry, Evidence, Pick, Table, TableDevice, stamp

CPU = Device(
    kind="cpu", name="Test", arch="x86_64", units=8, llc_bytes=1 << 20, memory_bytes=1 << 30
)
GPU = dataclasses.replace(
    CPU, kind="cuda", name="H100", arch="sm_90", units=132, driver="580.1", shared_bytes=1000
)
PROBLEM = Problem(m=1, n=64, k=128, spec=PRESETS["rq-2x256x8"])
EVIDENCE = Evidence(ratio=1.42, low=1.31, pairs=7, made="2026-01-02T03:04:05+00:00")

BASE = registry()["torch/dequant"]
SPACE = Space((Param("tile", (1, 2, 4), "rows"), Param("exact", (False, True), "order")))
TUNED = dataclasses.replace(
    BASE, name="tuned", space=SPACE, default=lambda problem, device: Config(tile=1, exact=False)
)
KERNELS = Registry({BASE.id: BASE, TUNED.id: TUNED}, {"numba.table": "ImportError: no numba"})
CONFIG = Config(tile=4, exact=True)


def default(problem: Problem) -> tuple[Kernel, Config]:
    return BASE, BASE.default(problem, CPU)


def entry(m: int = 1, device: Device = CPU, **changes: Any) -> Entry:
    usual = Entry(
        spec=PROBLEM.spec,
        n=PROBLEM.n,
        k=PROBLEM.k,
        dtype="float32",
        m=m,
        chosen=Pick.of(TUNED, CONFIG),
        default=Pick.of(*default(PROBLEM)),
        versions=stamp((TUNED, BASE), device),
        evidence=EVIDENCE,
    )
    return dataclasses.replace(usual, **changes)


def write(path: Path, *entries: Entry, device: Device = CPU) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Table(TableDevice.of(device), entries or (entry(device=device),))
    path.write_text(json.dumps(table.to_dict("a test")))
    return path


def ask(problem: Problem = PROBLEM, device: Device = CPU, found: Registry = KERNELS) -> Answer:
    return find(problem, device, found, default)


def quietly(*arguments: Any, **options: Any) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TunedTableWarning)
        return ask(*arguments, **options)


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tables but those of the test."""
    monkeypatch.delenv("VQBENCH_TUNED", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(tuned_lookup, "PACKAGE", tmp_path / "package")
    set_explicit(None)
    yield
    set_explicit(None)


# ------------------------------------------------------------------------------------------------
# where


def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A table in each of the four places."""
    found = {
        "explicit": write(tmp_path / "explicit.json"),
        "environment": write(tmp_path / "environment" / "a.json"),
        "user": write(tmp_path / "config" / "vqbench" / "tuned" / "a.json"),
        "package": write(tmp_path / "package" / "a.json"),
    }
    set_explicit(found["explicit"])
    monkeypatch.setenv("VQBENCH_TUNED", str(tmp_path / "environment"))
    return found


def test_the_first_place_with_an_answer_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fill(tmp_path, monkeypatch)
    assert list(places()) == list(found)
    for place, path in found.items():
        set_explicit(found["explicit"])  # reads again
        answer = quietly()
        assert answer.choice == (TUNED, CONFIG)
        served = answer.findings[-1]
        assert (served.place, served.path, served.kind) == (place, path, "served")
        assert len(answer.findings) == 1 + list(found).index(place)
        path.write_text("damaged")
    set_explicit(None)
    assert quietly().choice is None


def test_a_nearer_place_without_an_entry_lets_others_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fill(tmp_path, monkeypatch)
    write(found["explicit"], entry(n=65))
    write(found["environment"], entry(m=2))
    answer = ask()
    assert [one.kind for one in answer.findings] == ["none", "gap", "served"]
    assert answer.findings[-1].place == "user"


def test_that_the_default_stays_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fill(tmp_path, monkeypatch)
    stays = entry(chosen=entry().default, versions=stamp((BASE,), CPU))
    write(found["explicit"], stays)
    answer = ask()
    assert answer.choice == default(PROBLEM)
    assert answer.entries == (stays,)
    assert "the default stays" in answer.findings[-1].text


def test_off_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fill(tmp_path, monkeypatch)
    set_explicit("off")
    assert places() == {}
    assert ask().choice is None
    set_explicit(None)
    monkeypatch.setenv("VQBENCH_TUNED", "off")
    assert ask().choice is None
    set_explicit(found["explicit"])
    assert list(places()) == ["explicit"], "what was named explicitly comes before the word"
    assert ask().choice is not None
    monkeypatch.setenv("VQBENCH_TUNED", "")
    set_explicit(None)
    assert list(places()) == ["user", "package"]


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned_lookup.user_folder() == tmp_path / ".config" / "vqbench" / "tuned"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(tuned_lookup, "user_folder", homeless)
    assert list(places()) == ["package"]
    assert ask().choice is None


def test_tables_are_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json")
    set_explicit(str(path))
    assert ask().choice is not None
    path.unlink()
    assert ask().choice is not None
    set_explicit(path)
    with pytest.warns(TunedTableWarning, match="is no file"):
        assert ask().choice is None


def test_a_folder_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", forbidden)
    with pytest.warns(TunedTableWarning, match=r"can't be read \(Permission denied\)"):
        assert ask().choice is None


# ------------------------------------------------------------------------------------------------
# neighbours


def test_a_problem_between_two_that_agree(tmp_path: Path) -> None:
    weaker = dataclasses.replace(EVIDENCE, low=1.2)
    set_explicit(write(tmp_path / "t.json", entry(m=2), entry(m=8, evidence=weaker)))
    answer = ask(dataclasses.replace(PROBLEM, m=5))
    assert answer.choice == (TUNED, CONFIG)
    assert [one.m for one in answer.entries] == [2, 8]
    assert ">= 1.2)" in answer.findings[-1].text
    assert "at m=2 and m=8 alike" in answer.findings[-1].text


def test_between_two_that_keep_the_default_it_is_the_problems_own(tmp_path: Path) -> None:
    def growing(problem: Problem) -> tuple[Kernel, Config]:
        tile = next(t for t in (1, 2, 4) if 2 * t >= problem.m)
        return TUNED, Config(tile=tile, exact=False)

    def kept(m: int) -> Entry:
        pick = Pick.of(*growing(dataclasses.replace(PROBLEM, m=m)))
        return entry(m=m, chosen=pick, default=pick, versions=stamp((TUNED,), CPU))

    set_explicit(write(tmp_path / "t.json", kept(2), kept(8)))
    answer = find(dataclasses.replace(PROBLEM, m=4), CPU, KERNELS, growing)
    assert answer.choice == (TUNED, Config(tile=2, exact=False))


def test_of_neighbours_each_must_hold(tmp_path: Path) -> None:
    stale = entry(m=8, versions={"torch": "1.0"})
    for pair in ((entry(m=2), stale), (dataclasses.replace(stale, m=2), entry(m=8))):
        set_explicit(write(tmp_path / "t.json", *pair))
        with pytest.warns(TunedTableWarning, match=r"torch was 1\.0"):
            assert ask(dataclasses.replace(PROBLEM, m=5)).choice is None


def test_limits_are_those_of_the_problem_itself(tmp_path: Path) -> None:
    """Its neighbours may fit where the problem between them doesn't."""
    picky = dataclasses.replace(
        TUNED, supports=lambda problem, device: "no five" if problem.m == 5 else None
    )
    found = Registry({BASE.id: BASE, picky.id: picky}, {})
    chosen = Pick.of(picky, CONFIG)
    set_explicit(write(tmp_path / "t.json", entry(m=2, chosen=chosen), entry(m=8, chosen=chosen)))
    assert ask(dataclasses.replace(PROBLEM, m=6), found=found).choice == (picky, CONFIG)
    with pytest.warns(TunedTableWarning, match="can't take the problem: no five"):
        assert ask(dataclasses.replace(PROBLEM, m=5), found=found).choice is None


# ------------------------------------------------------------------------------------------------
# mismatches


def changed_pick(name: str, **changes: Any) -> Entry:
    usual = entry()
    return dataclasses.replace(
        usual, **{name: dataclasses.replace(getattr(usual, name), **changes)}
    )


MISMATCHES: dict[str, tuple[Callable[[], Entry], str, str]] = {
    "unknown kernel": (
        lambda: changed_pick("chosen", kernel="nobody/nothing"),
        "kernel",
        "names nobody/nothing, which can't be used: unknown here",
    ),
    "kernel that doesn't load": (
        lambda: changed_pick("chosen", kernel="numba/table"),
        "kernel",
        "ImportError: no numba",
    ),
    "unknown default": (lambda: changed_pick("default", kernel="x/y"), "kernel", "names x/y"),
    "source": (
        lambda: changed_pick("chosen", source="0" * 64),
        "source",
        "the source of torch/tuned has changed since it was measured; tune again",
    ),
    "default's source": (
        lambda: changed_pick("default", source=""),
        "source",
        "the source of torch/dequant has changed",
    ),
    "version": (
        lambda: entry(versions={"torch": "1.0"}),
        "versions",
        "torch was 1.0, now it is 2.",
    ),
    "version gone": (
        lambda: entry(versions={**entry().versions, "triton": "3"}),
        "versions",
        "triton was 3, now it is none",
    ),
    "version unknown": (lambda: entry(versions={}), "versions", "torch was none, now it is 2."),
    "other default": (
        lambda: entry(default=Pick.of(TUNED, Config(tile=1, exact=False))),
        "default",
        "held against torch/tuned exact=False tile=1, but the default is torch/dequant; tune",
    ),
    "value": (
        lambda: changed_pick("chosen", config=Config(tile=3, exact=True)),
        "config",
        "tile=3 is not one of (1, 2, 4)",
    ),
    "parameter missing": (
        lambda: changed_pick("chosen", config=Config(tile=4)),
        "config",
        "exact is missing",
    ),
    "parameter unknown": (
        lambda: changed_pick("chosen", config=CONFIG.replace(colour="red")),
        "config",
        "no parameter 'colour'",
    ),
    "true for one": (
        lambda: changed_pick("chosen", config=Config(tile=True, exact=True)),
        "config",
        "tile=True is of another type",
    ),
    "one for true": (
        lambda: changed_pick("chosen", config=Config(tile=4, exact=1)),
        "config",
        "exact=1 is of another type",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_has_changed_is_passed_over_and_said_once(name: str, tmp_path: Path) -> None:
    make, kind, word = MISMATCHES[name]
    path = write(tmp_path / "t.json", make())
    set_explicit(path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        answers = [ask() for _ in range(3)]
    for answer in answers:
        assert answer.choice is None
        assert answer.entries == ()
        assert [one.kind for one in answer.findings] == [kind]
        assert word in answer.refusals
    (only,) = heard
    assert only.category is TunedTableWarning
    assert str(only.message).startswith(f"tuned table {path} is passed over: ")
    assert word in str(only.message)
    assert "\n" not in str(only.message)


def test_each_kind_of_reason_and_each_table_has_its_word(tmp_path: Path) -> None:
    changed = entry(m=2, versions={"torch": "1.0"})
    illegal = changed_pick("chosen", config=Config(tile=3, exact=True))
    for name in ("a", "b"):
        write(tmp_path / f"{name}.json", changed, illegal)
    set_explicit(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for m in (1, 2, 1, 2):
            ask(dataclasses.replace(PROBLEM, m=m))
    assert len(heard) == 4
    set_explicit(tmp_path)  # tables are new: said again
    with pytest.warns(TunedTableWarning):
        ask()


def refusing(**fields: Any) -> Registry:
    kernel = dataclasses.replace(TUNED, **fields)
    return Registry({BASE.id: BASE, TUNED.id: kernel}, {})


def footprint(config: Config, problem: Problem, device: Device) -> Any:
    return dataclasses.replace(BASE.footprint(config, problem, device), shared_bytes=1001)


def raising(*_: Any) -> Any:
    raise ZeroDivisionError("first line\nsecond line")


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"supports": lambda *_: "only on Tuesdays"}, "limit", "the problem: only on Tuesdays"),
        ({"footprint": footprint}, "limit", "needs 1,001 bytes of shared memory, the device has"),
        ({"supports": raising}, "fails", "ZeroDivisionError: first line"),
        ({"footprint": raising}, "fails", "ZeroDivisionError: first line"),
    ],
)
def test_what_the_kernel_refuses_now(
    fields: dict[str, Any], kind: str, word: str, tmp_path: Path
) -> None:
    found = refusing(**fields)
    chosen = Pick.of(found[TUNED.id], CONFIG)
    set_explicit(write(tmp_path / "t.json", entry(device=GPU, chosen=chosen), device=GPU))
    with pytest.warns(TunedTableWarning, match=word) as heard:
        answer = ask(device=GPU, found=found)
    assert answer.choice is None
    assert [one.kind for one in answer.findings] == [kind]
    assert "second" not in str(heard[0].message)


def test_shared_memory_of_a_device_nobody_knows_is_no_limit(tmp_path: Path) -> None:
    found = refusing(footprint=footprint)
    chosen = Pick.of(found[TUNED.id], CONFIG)
    for has, served in ((1001, True), (None, True), (1000, False)):
        device = dataclasses.replace(GPU, shared_bytes=has)
        set_explicit(write(tmp_path / "t.json", entry(device=GPU, chosen=chosen), device=GPU))
        assert (quietly(device=device, found=found).choice is not None) == served


def test_another_driver(tmp_path: Path) -> None:
    set_explicit(write(tmp_path / "t.json", device=GPU))
    assert ask(device=GPU).choice == (TUNED, CONFIG)
    with pytest.warns(TunedTableWarning, match=r"driver was 580\.1, now it is 581"):
        assert ask(device=dataclasses.replace(GPU, driver="581")).choice is None


def test_a_default_that_cannot_be_had_for_a_neighbour(tmp_path: Path) -> None:
    def gone(problem: Problem) -> tuple[Kernel, Config]:
        raise BackendError("no kernel takes it")

    set_explicit(write(tmp_path / "t.json"))
    with pytest.warns(TunedTableWarning, match="BackendError: no kernel takes it"):
        assert find(PROBLEM, CPU, KERNELS, gone).choice is None


def test_a_damaged_table_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 1')
    (tmp_path / "b.json").write_text('{"schema": 99}')
    (tmp_path / "c.json").mkdir()
    (tmp_path / ".vqbench-1.tmp").write_text("half a table")
    set_explicit(tmp_path)
    with pytest.warns(TunedTableWarning) as heard:
        answer = ask()
    assert answer.choice is None
    assert [one.kind for one in answer.findings] == ["damaged"] * 3
    assert len(heard) == 3
    write(tmp_path / "d.json")
    set_explicit(tmp_path)
    assert quietly().choice == (TUNED, CONFIG), "others in the folder still serve"


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    data = json.loads(write(tmp_path / "t.json").read_text())
    data["entries"][0]["spec"]["x" * 10_000] = 1
    (tmp_path / "t.json").write_text(json.dumps(data))
    set_explicit(tmp_path)
    assert len(quietly().findings[0].text) == 400


# ------------------------------------------------------------------------------------------------
# other devices


@pytest.mark.parametrize(
    "other",
    [{"kind": "cuda"}, {"name": "Another"}, {"arch": "x86_64-avx512"}, {"units": 4}],
)
def test_a_table_of_another_device_never_serves(other: dict[str, Any], tmp_path: Path) -> None:
    device = dataclasses.replace(CPU, **other)
    path = write(tmp_path / "t.json", device=device)
    set_explicit(path)
    with pytest.warns(TunedTableWarning, match="for .*; this is Test x86_64, 8 threads"):
        assert ask().choice is None


def test_in_a_folder_other_devices_are_no_news(tmp_path: Path) -> None:
    for name in ("H100", "H200"):
        write(tmp_path / f"{name}.json", device=dataclasses.replace(GPU, name=name))
    set_explicit(tmp_path)
    answer = ask()
    assert [one.kind for one in answer.findings] == ["device", "device"]
    assert answer.refusals == ""


def test_fewer_threads_are_news_unless_another_table_fits(tmp_path: Path) -> None:
    write(tmp_path / "a.json", device=dataclasses.replace(CPU, units=4))
    set_explicit(tmp_path)
    with pytest.warns(TunedTableWarning, match="4 threads; this is Test x86_64, 8 threads"):
        assert "4 threads" in ask().refusals
    write(tmp_path / "b.json", entry(n=65))
    set_explicit(tmp_path)
    assert [one.kind for one in ask().findings] == ["state", "none"]
