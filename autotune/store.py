"""The store: every attempt of every tuning run, one row each, with all its raw samples.

SQLite by default, any database that SQLAlchemy speaks by URL. An attempt is claimed before it is
made: the row is there with the status `claimed`, so that two processes that tune the same thing
never repeat each other, and a process that was killed loses the attempt in flight alone. Whoever
comes next takes over claims whose process is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from autotune.measurement import Measurement
from vqkernels.errors import ContainerError
from vqkernels.space import Config

__all__ = ["Attempt", "Key", "Store", "default_url", "subject_key"]

SCHEMA_VERSION = 1

# A claim of another machine, whose processes can't be looked at, is given up after this.
ABANDONED = timedelta(hours=1)

_METADATA = sa.MetaData()
_SCHEMA = sa.Table("vqbench_schema", _METADATA, sa.Column("version", sa.Integer, nullable=False))
_SUBJECTS = sa.Table(
    "subjects",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(64), nullable=False, unique=True),
    sa.Column("facts", sa.JSON, nullable=False),
)
_ATTEMPTS = sa.Table(
    "attempts",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("subject", sa.ForeignKey("subjects.id"), nullable=False),
    sa.Column("kernel", sa.String(200), nullable=False),
    sa.Column("source", sa.String(64), nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("measurement", sa.JSON),
    sa.Column("log", sa.Text, nullable=False, default=""),
    sa.Column("owner", sa.String(300), nullable=False),
    sa.Column("claimed", sa.String(40), nullable=False),
    sa.Column("finished", sa.String(40)),
    sa.Column("stamp", sa.JSON, nullable=False),
    sa.UniqueConstraint("subject", "kernel", "source", "config", "round"),
)
_VERDICTS = sa.Table(
    "verdicts",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("subject", sa.ForeignKey("subjects.id"), nullable=False),
    sa.Column("verdict", sa.JSON, nullable=False),
    sa.Column("made", sa.String(40), nullable=False),
    sa.Column("stamp", sa.JSON, nullable=False),
)


@dataclasses.dataclass(frozen=True)
class Key:
    """What names an attempt on a subject: kernel, hash of its source, config and round.

    round: 0 in the search, 1 and up where finalists are measured again.
    """

    kernel: str
    source: str
    config: Config
    round: int = 0


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A finished attempt. log: what a process left behind that died over it."""

    key: Key
    measurement: Measurement
    log: str
    finished: str


def subject_key(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what is tuned and where, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def default_url() -> str:
    """VQBENCH_STORE, or a SQLite file in the user's data folder."""
    if url := os.environ.get("VQBENCH_STORE"):
        return url
    base = os.environ.get("XDG_DATA_HOME")
    folder = Path(base) if base else Path.home() / ".local" / "share"
    return f"sqlite:///{folder / 'vqbench' / 'tuning.sqlite'}"


class Store:
    """Attempts in the database at `url`, which is made where it isn't there.

    Raises ContainerError, one line, where it can't be opened, is damaged, or is another version's.
    """

    def __init__(self, url: str | None = None, *, stamp: Mapping[str, Any] | None = None) -> None:
        self._stamp = dict(stamp or {})
        self._owner = _owner()
        given = url or default_url()
        self.url = re.sub(r"://([^:@/]*):[^@/]*@", r"://\1:***@", given)  # without the password
        try:
            place = sa.make_url(given)
            if place.get_backend_name() == "sqlite" and place.database:
                Path(place.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(place)
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise ContainerError(
                f"store {self.url}: {_line(error)}; give a URL such as "
                f"sqlite:///tuning.sqlite or postgresql+psycopg://user@host/name"
            ) from error
        if place.get_backend_name() == "sqlite":
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
        try:
            self._prepare()
        except ContainerError:
            self.close()
            raise

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    def subject(self, facts: Mapping[str, Any]) -> int:
        """The row of what is tuned, made where it isn't there."""
        key = subject_key(facts)
        with self._transaction() as run:
            found = run.execute(sa.select(_SUBJECTS.c.id).where(_SUBJECTS.c.key == key)).scalar()
            if found is not None:
                return int(found)
        try:
            with self._transaction() as run:
                row = run.execute(sa.insert(_SUBJECTS).values(key=key, facts=dict(facts)))
                return int(row.inserted_primary_key[0])  # type: ignore[index]  # an insert has one
        except IntegrityError:  # another process was faster
            return self.subject(facts)

    def claim(self, subject: int, key: Key) -> int | None:
        """The number of a claim on an attempt; None where it is made already, or being made."""
        values = {**_columns(subject, key), **self._mine(), "stamp": self._stamp}
        try:
            with self._transaction() as run:
                row = run.execute(sa.insert(_ATTEMPTS).values(status="claimed", **values))
                return int(row.inserted_primary_key[0])  # type: ignore[index]  # an insert has one
        except IntegrityError:
            return self._take_over(subject, key)

    def finish(self, claim: int, measurement: Measurement, log: str = "") -> None:
        """Record what came of a claim."""
        with self._transaction() as run:
            run.execute(
                sa.update(_ATTEMPTS)
                .where(_ATTEMPTS.c.id == claim, _ATTEMPTS.c.owner == self._owner)
                .values(
                    status=measurement.status,
                    measurement=measurement.to_dict(),
                    log=log,
                    finished=_now(),
                )
            )

    def give_up(self, claim: int) -> None:
        """Drop a claim that came to nothing (Ctrl-C)."""
        with self._transaction() as run:
            run.execute(
                sa.delete(_ATTEMPTS).where(
                    _ATTEMPTS.c.id == claim,
                    _ATTEMPTS.c.owner == self._owner,
                    _ATTEMPTS.c.status == "claimed",
                )
            )

    def find(self, subject: int, key: Key) -> Attempt | None:
        """The finished attempt of this key, if there is one."""
        where = [_ATTEMPTS.c[name] == value for name, value in _columns(subject, key).items()]
        with self._transaction() as run:
            row = run.execute(sa.select(_ATTEMPTS).where(*where)).mappings().one_or_none()
        return None if row is None or row["measurement"] is None else _attempt(row)

    def attempts(self, subject: int) -> list[Attempt]:
        """All finished attempts on a subject, in the order in which they were claimed."""
        query = (
            sa.select(_ATTEMPTS)
            .where(_ATTEMPTS.c.subject == subject, _ATTEMPTS.c.measurement.is_not(None))
            .order_by(_ATTEMPTS.c.id)
        )
        with self._transaction() as run:
            return [_attempt(row) for row in run.execute(query).mappings() if row["finished"]]

    def subjects(self) -> dict[int, dict[str, Any]]:
        """The facts of every subject, by row."""
        with self._transaction() as run:
            return {row.id: row.facts for row in run.execute(sa.select(_SUBJECTS))}

    def conclude(self, subject: int, verdict: Mapping[str, Any]) -> None:
        """Record what a tuning run decided on a subject; see `autotune.export`."""
        row = {"subject": subject, "verdict": dict(verdict), "made": _now(), "stamp": self._stamp}
        with self._transaction() as run:
            run.execute(sa.insert(_VERDICTS).values(row))

    def verdicts(self) -> list[dict[str, Any]]:
        """The last verdict on each subject."""
        newest = sa.select(sa.func.max(_VERDICTS.c.id)).group_by(_VERDICTS.c.subject)
        query = sa.select(_VERDICTS.c.verdict).where(_VERDICTS.c.id.in_(newest))
        with self._transaction() as run:
            return list(run.execute(query.order_by(_VERDICTS.c.id)).scalars())

    def _mine(self) -> dict[str, str]:
        return {"owner": self._owner, "claimed": _now()}

    def _take_over(self, subject: int, key: Key) -> int | None:
        """A claim whose process is gone becomes this one's."""
        where = [_ATTEMPTS.c[name] == value for name, value in _columns(subject, key).items()]
        with self._transaction() as run:
            row = run.execute(sa.select(_ATTEMPTS).where(*where)).mappings().one_or_none()
            if row is None:  # it wasn't the attempt that was there already
                raise ContainerError(f"store {self.url}: has no subject {subject}; name it first")
            if row["status"] != "claimed" or _alive(row["owner"], row["claimed"]):
                return None
            # the owner is asked for again, so that one alone of several takes it over
            taken = run.execute(
                sa.update(_ATTEMPTS)
                .where(_ATTEMPTS.c.id == row["id"], _ATTEMPTS.c.owner == row["owner"])
                .values(**self._mine())
            )
            return int(row["id"]) if taken.rowcount == 1 else None

    def _prepare(self) -> None:
        # another process may just have made the tables; what is really wrong shows below
        with contextlib.suppress(SQLAlchemyError):
            _METADATA.create_all(self._engine)
        with self._transaction() as run:
            versions = list(run.execute(sa.select(_SCHEMA.c.version)).scalars())
            if not versions:
                run.execute(sa.insert(_SCHEMA).values(version=SCHEMA_VERSION))
            elif set(versions) != {SCHEMA_VERSION}:
                raise ContainerError(
                    f"store {self.url}: has schema {versions[0]}, this build uses "
                    f"{SCHEMA_VERSION}; name another store"
                )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as run:
                yield run
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise ContainerError(
                f"store {self.url}: {_line(error)}; check the database, or name another store"
            ) from error


def _columns(subject: int, key: Key) -> dict[str, Any]:
    config = json.dumps(dict(key.config), sort_keys=True)
    return {
        "subject": subject,
        "kernel": key.kernel,
        "source": key.source,
        "config": config,
        "round": key.round,
    }


def _attempt(row: Mapping[Any, Any]) -> Attempt:
    config = Config(**json.loads(row["config"]))
    key = Key(row["kernel"], row["source"], config, row["round"])
    return Attempt(key, Measurement.from_dict(row["measurement"]), row["log"], row["finished"])


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Readers beside a writer, and patience between writers."""
    for setting in ("journal_mode=WAL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _owner() -> str:
    """This process: its machine, number and start, since numbers are used again."""
    return f"{platform.node()}/{os.getpid()}/{_started(os.getpid())}"


def _started(pid: int) -> str:
    """When a process started, in clock ticks; empty where none is, or the system can't tell."""
    try:
        # the name, in brackets, may hold anything: fields are counted from behind it
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    except (OSError, IndexError, UnicodeDecodeError):
        return ""


def _alive(owner: str, claimed: str) -> bool:
    """Whether a claim's process may still be at it."""
    host, pid, started = owner.rsplit("/", 2)
    if host == platform.node() and started:
        return _started(int(pid)) == started
    return datetime.now(UTC) - datetime.fromisoformat(claimed) < ABANDONED


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _line(error: BaseException) -> str:
    origin = getattr(error, "orig", None) or error
    return (str(origin).strip().splitlines() or [type(error).__name__])[0]
