"""Reports to render: made-up outcomes, names with odd characters."""

from __future__ import annotations

from hypothesis import strategies as st

from bench.gate.outcome import Outcome, Report

VERDICTS = ("IDENTICAL", "PASS", "FASTER", "REGRESSED", "INCONCLUSIVE", "INVALID")

MEASURED = {
    "baseline_s": 26.7e-6,
    "candidate_s": 28.9e-6,
    "ratio": 1.082,
    "low": 1.051,
    "high": 1.113,
    "smallest": 1.073,
    "pairs": 7,
}

# What some form gives a meaning, and then anything, halves of surrogate pairs included.
ODD = st.text(
    "|`<>&_*[]()\\'\"\n\r\t\x00\x1b\x85\u2028\ufffe\ud800~$#@!:-+=.1 ax", max_size=12
) | st.text(st.characters(exclude_categories=()), max_size=12)


def outcome(verdict="PASS", layer="q_proj", *, measured=True, **fields) -> Outcome:
    """A case of `verdict`; INVALID ones are without a measurement."""
    values = {
        "workload": "minilm",
        "layer": layer,
        "format": "rq-2x256x8",
        "n": 384,
        "k": 384,
        "m": 1,
        "dtype": "float32",
        "kernel": "numba/table",
        "verdict": verdict,
        "reason": f"why {layer} is {verdict}",
    }
    if measured and verdict != "INVALID":
        values |= MEASURED
    return Outcome(**values | fields)


def report(*outcomes, **fields) -> Report:
    values = {"baseline": "abc1234", "candidate": "working tree", "device": "Test CPU"}
    return Report(outcomes=tuple(outcomes), **values | fields)


def one_of_each(**fields) -> Report:
    """A case of every verdict, each with its verdict as the layer's name, and a wrong one."""
    cases = [outcome(verdict, f"layer.{verdict.lower()}") for verdict in VERDICTS]
    return report(*cases, outcome("INVALID", "layer.wrong", wrong=True), **fields)
