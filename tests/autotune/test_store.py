"""The store: what is claimed, finished, taken over; several processes; files that are no store."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from autotune import store as store_module
from autotune.measurement import Correctness, Measurement
from autotune.store import Key, Store, default_url, subject_key
from tests.autotune import postgres
from vqkernels.errors import ContainerError
from vqkernels.space import Config

FACTS = {"problem": {"m": 1, "n": 64}, "device": "cpu"}
RIGHT = Measurement(
    status="ok",
    samples_s=(1e-3, 1.1e-3, 0.1 + 0.2),
    correctness=Correctness(worst=0.1, max_abs=1e-6, relative_rms=1e-7, controls={"zeros": True}),
)
WRONG = Measurement(status="timeout", reason="not done after 5 s")


def key(number: int = 0, **fields) -> Key:
    config = Config(tile=number, layout="cells", fast=True)
    return Key("numba/x", "hash", config, **fields)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with postgres.serve() as url:
        yield url


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stores are closed when a test ends: a server's connections are."""
    opened: list[Store] = []
    begin = Store.__init__

    def begin_and_note(self: Store, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        opened.append(self)

    monkeypatch.setattr(Store, "__init__", begin_and_note)
    yield
    for one in opened:
        one.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'deep' / 'tuning.sqlite'}"
    return postgres.database(request.getfixturevalue("server"), tmp_path.name)


def test_what_is_finished_comes_back_whole(url: str) -> None:
    one = Store(url, stamp={"numba": "1"})
    subject = one.subject(FACTS)
    claim = one.claim(subject, key())
    assert one.find(subject, key()) is None, "claimed is not finished"
    one.finish(claim, RIGHT, "a log")
    failed = one.claim(subject, key(1))
    one.finish(failed, WRONG)
    one.close()
    first, second = Store(url).attempts(subject)
    assert (first.key, first.measurement, first.log) == (key(), RIGHT, "a log")
    assert second.measurement == WRONG
    assert type(first.key.config["fast"]) is bool
    assert datetime.fromisoformat(first.finished).tzinfo is not None


def test_an_attempt_is_made_once(url: str) -> None:
    one, other = Store(url), Store(url)
    subject = one.subject(FACTS)
    assert other.subject(dict(reversed(FACTS.items()))) == subject
    claim = one.claim(subject, key())
    assert claim is not None
    assert other.claim(subject, key()) is None, "in flight elsewhere"
    one.finish(claim, RIGHT)
    assert one.claim(subject, key()) is None, "made"
    assert one.claim(subject, key(round=1)) is not None, "another round"
    assert one.claim(one.subject({"other": 1}), key()) is not None, "another subject"


def test_a_subject_that_is_not_there(url: str) -> None:
    with pytest.raises(ContainerError, match="has no subject 7"):
        Store(url).claim(7, key())


def test_a_claim_may_be_given_up(url: str) -> None:
    one = Store(url)
    subject = one.subject(FACTS)
    one.give_up(one.claim(subject, key()))
    again = one.claim(subject, key())
    one.finish(again, RIGHT)
    one.give_up(again)
    assert len(one.attempts(subject)) == 1, "what is finished stays"


CLAIMS = """
import os, sys
from autotune.store import Key, Store
from vqkernels.space import Config
one = Store(sys.argv[1])
config = Config(tile=0, layout="cells", fast=True)
print(one.claim(one.subject({"problem": {"m": 1, "n": 64}, "device": "cpu"}),
                Key("numba/x", "hash", config)), flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_claim_of_a_killed_process_is_taken_over_once(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLAIMS, url], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    one, other = Store(url), Store(url)
    subject = one.subject(FACTS)
    claim = one.claim(subject, key())
    assert claim == int(done.stdout)
    assert other.claim(subject, key()) is None, "its new owner is alive"
    one.finish(claim, RIGHT)
    assert [attempt.key for attempt in one.attempts(subject)] == [key()]


def test_a_claim_of_another_machine_is_given_time(url: str, monkeypatch) -> None:
    elsewhere = Store(url)
    monkeypatch.setattr(elsewhere, "_owner", "elsewhere/1/2")
    subject = elsewhere.subject(FACTS)
    claim = elsewhere.claim(subject, key())
    here = Store(url)
    assert here.claim(subject, key()) is None
    long_ago = datetime.now(UTC) - store_module.ABANDONED - timedelta(minutes=1)
    with here._transaction() as run:
        run.execute(sa.update(store_module._ATTEMPTS).values(claimed=long_ago.isoformat()))
    assert here.claim(subject, key()) == claim
    elsewhere.finish(claim, WRONG)
    assert here.find(subject, key()) is None, "no longer its own"


def test_numbers_of_processes_are_used_again() -> None:
    mine = store_module._owner()
    now = store_module._now()
    assert store_module._alive(mine, now)
    host, pid, _ = mine.rsplit("/", 2)
    assert not store_module._alive(f"{host}/{pid}/12345", now)


def _claim_all(url: str, count: int, results) -> None:
    one = Store(url)
    subject = one.subject(FACTS)
    mine = []
    for number in range(count):
        claim = one.claim(subject, key(number))
        if claim is not None:
            one.finish(claim, RIGHT, str(os.getpid()))
            mine.append(number)
    results.put(mine)


def test_two_processes_share_a_store(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    count = 40
    both = [context.Process(target=_claim_all, args=(url, count, results)) for _ in range(2)]
    for process in both:
        process.start()
    mine = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    assert sorted(mine[0] + mine[1]) == list(range(count)), "each attempt once"
    one = Store(url)
    assert len(one.attempts(one.subject(FACTS))) == count


def test_the_key_of_a_subject_knows_no_order() -> None:
    assert subject_key({"a": 1, "b": [1, 2]}) == subject_key({"b": [1, 2], "a": 1})
    assert subject_key({"a": 1}) != subject_key({"a": 2})


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 40)
    with pytest.raises(ContainerError, match=r"store sqlite.*notes.*not a database.*another"):
        Store(f"sqlite:///{path}")
    assert path.read_text().startswith("not a database"), "left as it was"


def test_a_store_of_another_version(url: str) -> None:
    Store(url).close()
    engine = sa.create_engine(url)
    with engine.begin() as run:
        run.execute(sa.text("UPDATE vqbench_schema SET version = 99"))
    engine.dispose()
    with pytest.raises(ContainerError, match="has schema 99, this build uses 1"):
        Store(url)


@pytest.mark.parametrize("url", ["nonsense", "nonsense://x", "sqlite:////proc/no/such/file"])
def test_a_url_that_leads_nowhere(url: str) -> None:
    with pytest.raises(ContainerError, match=r"store .*(give a URL|another store)") as error:
        Store(url)
    assert "\n" not in str(error.value)


def test_passwords_are_not_shown() -> None:
    with pytest.raises(ContainerError) as error:
        Store("postgresql+nodriver://user:secret@host/name")
    assert "secret" not in str(error.value)


def test_where_the_store_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("VQBENCH_STORE", raising=False)
    assert default_url() == f"sqlite:///{tmp_path}/vqbench/tuning.sqlite"
    monkeypatch.setenv("VQBENCH_STORE", "sqlite:///x")
    assert default_url() == "sqlite:///x"
