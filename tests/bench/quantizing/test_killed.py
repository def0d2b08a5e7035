"""A run that is killed at any moment is gone on with, and gives the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def check_kills(*jobs: str) -> None:
    command = [sys.executable, "-m", "tests.bench.quantizing.killer", *jobs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == sum(int(count) for job in jobs for count in job.split(":")[1:])
    for record in records:
        assert record["killed"] or record["line"] < 0, record  # a moment may come too late
        assert record["same"], record
        # what was finished is not quantised again
        if record["killed"] and not record["complete"]:
            assert record["begun"] == record["layers"] - record["finished"], record
    assert len({record["finished"] for record in records}) > 2, records


def test_runs_killed_at_some_lines() -> None:
    check_kills("file:6:1")


@pytest.mark.sweep
def test_runs_killed_at_many_lines() -> None:
    check_kills("file:60:15", "shards:60:15")
