"""What a GPU check ends with: the blocks' times against the goals, met or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records import measurement_of

__all__ = ["goal_lines"]

Record = Mapping[str, Any]

DENSE, AQLM, BEST = "torch/dense", "aqlm/cuda", "best"

# (m, against, at least that many times as fast): decoding one token beside the BLAS and beside the
# fastest public kernel for AQLM's formats, and a prompt beside the BLAS.
GOALS = ((1, DENSE, 3.0), (1, AQLM, 1.3), (2048, DENSE, 0.8))
NAMES = {DENSE: "the dense product", AQLM: "AQLM's CUDA kernels"}


def goal_lines(records: Sequence[Record]) -> list[str]:
    """A line for each format and goal: how a block of our fastest kernels compares.

    One timer times all blocks of a run, so every ratio is of two times by the same.
    """
    blocks = {
        (one["format"], one["m"], one["kernel"]): one for one in records if one["layer"] == "block"
    }
    names = dict.fromkeys(name for name, *_ in blocks)
    lines = []
    for m, against, goal in GOALS:
        for name in names:
            ours, theirs = blocks.get((name, m, BEST)), blocks.get((name, m, against))
            if (ours or theirs) and _offered(theirs):
                lines.append(f"block {name} m={m}: {_verdict(ours, theirs, against, goal)}")
    return lines


def _offered(theirs: Record | None) -> bool:
    """Whether the other side has that format at all; a refusal is listed with the refusals."""
    return theirs is not None and theirs["status"] != "constraint"


def _verdict(ours: Record | None, theirs: Record | None, against: str, goal: float) -> str:
    for side, block in (("ours", ours), (NAMES[against], theirs)):
        if block is None or block["status"] != "ok":
            reason = "no kernel has all layers" if block is None else block["reason"]
            return f"no ratio to {NAMES[against]}: {side}: {reason}"
    assert ours is not None and theirs is not None
    mine, other = measurement_of(ours).median_s, measurement_of(theirs).median_s
    ratio = other / mine
    kernels = "+".join(dict.fromkeys(step["kernel"] for step in ours["steps"]))
    return (
        f"{mine * 1e6:.1f} us ({kernels}), {ratio:.2f} x {NAMES[against]}; "
        f"goal {goal:g}: {'met' if ratio >= goal else 'missed'}"
    )
