"""A writer killed at any moment leaves the old set or the new one, and nothing that stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def check_kills(*jobs: str) -> None:
    command = [sys.executable, "-m", "tests.vqkernels.container.killer", *jobs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == sum(int(count) for job in jobs for count in job.split(":")[2:])
    for record in records:
        assert record["killed"] or record["line"] < 0, record  # a moment may come too late
        if record["before"] == "old" or record["found"] == "new":
            assert record["found"] in ("old", "new"), record
        else:  # nothing is taken for whole
            says = ("there is no such file", "a folder without", "No such file")
            assert any(text in record["found"] for text in says), record
        assert record["next"] == "next", record
        assert record["clean"], record
    for job in jobs:
        kind, before, *_ = job.split(":")
        seen = {r["found"] for r in records if (r["kind"], r["before"]) == (kind, before)}
        assert len(seen & {"new"}) == 1, job  # the last lines come after the new set is there
        assert len(seen) > 1, job


def test_writers_killed_at_some_lines() -> None:
    check_kills("shards:old:9:2", "ranks:old:9:0", "shards:none:4:0", "ranks:none:4:0")


@pytest.mark.sweep
def test_writers_killed_at_many_lines() -> None:
    check_kills("shards:old:70:15", "ranks:old:70:15", "shards:none:20:5", "ranks:none:20:5")
