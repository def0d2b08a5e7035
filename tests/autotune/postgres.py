"""A PostgreSQL server for tests, where one is installed: its own folder, no network."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

__all__ = ["database", "serve"]


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The URL of a fresh server's first database; skips the test where there can be no server."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = [shutil.which(name) for name in ("initdb", "postgres")]
    if None in programs:
        pytest.skip("no PostgreSQL on this machine")
    user = _user()
    folder = Path(tempfile.mkdtemp(prefix="vqbench-"))  # a socket's name has 107 bytes at most
    try:
        if user is not None:
            os.chown(folder, *user)
        with _server(folder, user):
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    finally:
        shutil.rmtree(folder)


def _user() -> tuple[int, int] | None:
    """Who the server runs as: PostgreSQL refuses to be root. None: as we do."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return found.pw_uid, found.pw_gid
    pytest.skip("no user but root to run PostgreSQL as")


@contextlib.contextmanager
def _server(folder: Path, user: tuple[int, int] | None) -> Iterator[None]:
    who = {} if user is None else {"user": user[0], "group": user[1], "extra_groups": []}
    data = str(folder / "data")
    make = ["initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **who)
    line = ["postgres", "-D", data, "-k", str(folder), "-c", "listen_addresses=", "-F"]
    with subprocess.Popen(
        line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **who
    ) as process:
        try:
            end = time.monotonic() + 60
            while subprocess.run(["pg_isready", "-q", "-h", str(folder)], check=False).returncode:
                assert process.poll() is None, "PostgreSQL did not start"
                assert time.monotonic() < end, "PostgreSQL does not answer"
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGINT)  # ends connections, then itself


def database(server: str, name: str) -> str:
    """The URL of a new, empty database of the server."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as run:
        run.execute(sa.text(f'CREATE DATABASE "{name}" TEMPLATE template0'))
    engine.dispose()
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)
