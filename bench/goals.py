"""What a GPU check ends with: the blocks' times against the goals, met or missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.records import measurement_of

__all__ = ["goal_lines"]

Record = Mapping[str, Any]
Blocks = dict[tuple[str, int, str], Record]  # by format, m and kernel

DENSE, AQLM = "torch/dense", "aqlm/cuda"
OURS = ("best", "best-fused")  # the faster of them is ours

# (m, against, at least that many times as fast): decoding beside the BLAS and beside the fastest
# public kernel for AQLM's formats, and a prompt beside the BLAS.
GOALS = (
    (1, DENSE, 5.0),
    (1, AQLM, 2.5),
    (8, DENSE, 3.0),
    (16, DENSE, 1.0),
    (32, DENSE, 1.0),
    (2048, DENSE, 0.8),
)
NAMES = {DENSE: "the dense product", AQLM: "AQLM's CUDA kernels"}
# One token: that share of the rate at which this run read memory.
SHARE = 0.75
# Eight tokens over one: entries are read once for all of them.
FLAT = 1.9
# One token, in one graph, by workload: seconds.
LIMITS = {"llama3-8b": 40e-6}


def goal_lines(records: Sequence[Record]) -> list[str]:
    """A line for each format and goal: how a block of our fastest kernels compares.

    One timer times all blocks of a run, so every ratio is of two times by the same.
    """
    blocks = {
        (one["format"], one["m"], one["kernel"]): one for one in records if one["layer"] == "block"
    }
    names = dict.fromkeys(name for name, *_ in blocks)
    lines = list(_against(blocks, list(names)))
    for name in names:
        lines += _alone(blocks, name)
    return lines


def _against(blocks: Blocks, names: Sequence[str]) -> Iterator[str]:
    for m, against, goal in GOALS:
        for name in names:
            ours, theirs = _ours(blocks, name, m), blocks.get((name, m, against))
            if (ours or theirs) and _offered(theirs):
                yield f"block {name} m={m}: {_verdict(ours, theirs, against, goal)}"


def _alone(blocks: Blocks, name: str) -> Iterator[str]:
    """What our block of one token, and of eight beside it, is held to without another's."""
    one = _ours(blocks, name, 1)
    if one is None or one["status"] != "ok":
        return
    measured = measurement_of(one)
    seconds = measured.median_s
    if "bandwidth" in one:
        share = (measured.moved_bytes or 0) / seconds / one["bandwidth"]["best"]
        met = _met(share >= SHARE, f"{SHARE:.0%}")
        yield f"block {name} m=1: {share:.0%} of memory's rate; {met}"
    if limit := LIMITS.get(one["workload"]):
        goal = f"{limit * 1e6:g} us"
        yield f"block {name} m=1: {seconds * 1e6:.1f} us; {_met(seconds < limit, goal)}"
    eight = _ours(blocks, name, 8)
    if eight is not None and eight["status"] == "ok":
        ratio = measurement_of(eight).median_s / seconds
        goal = f"at most {FLAT:g}"
        yield f"block {name} m=8: {ratio:.2f} x the time of one token; {_met(ratio <= FLAT, goal)}"


def _ours(blocks: Blocks, name: str, m: int) -> Record | None:
    """The faster of our blocks; one that failed where neither is right."""
    found = [blocks[name, m, kernel] for kernel in OURS if (name, m, kernel) in blocks]
    right = [one for one in found if one["status"] == "ok"]
    if right:
        return min(right, key=lambda one: measurement_of(one).median_s)
    return found[0] if found else None


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
    if ours["kernel"] == "best-fused":
        kernels += ", fused"
    return (
        f"{mine * 1e6:.1f} us ({kernels}), {ratio:.2f} x {NAMES[against]}; "
        f"{_met(ratio >= goal, f'{goal:g}')}"
    )


def _met(met: bool, goal: str) -> str:
    return f"goal {goal}: {'met' if met else 'missed'}"
