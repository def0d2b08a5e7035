"""Counts of verdicts as shares with their intervals: the columns of every table of error rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from autotune.proportion import interval
from autotune.verdict import Verdict

__all__ = ["shares"]


def shares(verdicts: Mapping[str, int]) -> dict[str, float]:
    """`regressed`, `regressed_low`, `regressed_high` and so on: each share and its 95 % interval.

    The intervals take comparisons for independent, which cases of one call, measured by the same
    processes, are not quite. Without comparisons each share is 0, and may be anything to 1.
    """
    total, columns = sum(verdicts.values()), {}
    for verdict in get_args(Verdict):
        found, name = verdicts.get(verdict, 0), verdict.lower()
        columns[name] = found / total if total else 0.0
        columns[f"{name}_low"], columns[f"{name}_high"] = interval(found, total)
    return columns
