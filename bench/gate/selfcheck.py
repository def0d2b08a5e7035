"""How often the gate is wrong on this machine: its own calls, on sides whose truth is known.

A side against itself, where REGRESSED is false, and against itself with every call delayed by a
share of its time, where anything else is missed. That both sides are one code is not held for
them (rule IDENTICAL is off). Each comparison is made as a gate makes it, and judged as a gate
judges once it knows the noise of its cases from here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.verdict import Comparison
from bench.gate.decide import Conclusion, Rules, comparisons, conclude, suspects
from bench.gate.job import Target
from bench.gate.journal import Round, Sample
from bench.gate.noise import Machine, Noise, measured
from bench.gate.run import Options, open_session
from bench.gate.session import Progress, Session
from bench.gate.shares import shares
from bench.validity import grouped

__all__ = ["Selfcheck", "run_selfcheck"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selfcheck:
    """What came of all calls.

    rows: by slowdown (0: none), judged with the noise floors or without, the shares of verdicts
    with intervals. noise: what a gate reads. doubts: what was odd, and in how many comparisons.
    records: the file of all samples.
    """

    rows: tuple[dict[str, Any], ...]
    noise: Noise
    doubts: Mapping[str, int]
    records: str


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call: its slowdown, and the samples of its rounds."""

    effect: float
    first: list[Sample]
    fresh: list[Sample]


def run_selfcheck(
    options: Options,
    effects: Sequence[float],
    rounds: int,
    slowed_rounds: int,
    results: Path,
    *,
    resume: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Selfcheck:
    """Make `rounds` calls of a side against itself, and `slowed_rounds` with each of `effects`.

    Slowed calls come between the others, so that all meet the machine in the same moods.
    """
    with open_session(options, results, kind="selfcheck", resume=resume, progress=progress) as (
        session,
        _,
    ):
        calls = [
            _call(session, effect, number)
            for number in range(max(rounds, slowed_rounds))
            for effect, count in ((0.0, rounds), *((one, slowed_rounds) for one in effects))
            if number < count
        ]
        return _conclude(options, session.job.targets, calls, str(session.journal.path))


def _call(session: Session, effect: float, number: int) -> _Call:
    """A gate's measurements, with the candidate slower by `effect`."""
    side = dataclasses.replace(session.sides["candidate"], slow=effect)
    one = dataclasses.replace(session, sides={**session.sides, "candidate": side})
    name = f"{effect:.0%} slower, call {number + 1}" if effect else f"A/A, call {number + 1}"
    cases = one.job.targets
    first = one.samples(Round(name, 0), cases)
    again = suspects(cases, first, Rules(identical=False))
    return _Call(effect, first, one.samples(Round(name, 1), again) if again else [])


def _conclude(
    options: Options, targets: Sequence[Target], calls: Sequence[_Call], records: str
) -> Selfcheck:
    bare = _judged(targets, calls, Rules(identical=False))
    noise = _noise(options, targets, calls, bare)
    known = _judged(targets, calls, Rules(identical=False, noise=noise))
    noise = _noise(options, targets, calls, known)
    rows = [
        {"slower": effect, "floors": floors, "comparisons": counts.total(), **shares(counts)}
        for floors, found in (("no", bare), ("yes", known))
        for effect, counts in _counts(found).items()
    ]
    odd = grouped(case.doubts for _, one in known for case in one.outcomes)
    return Selfcheck(rows=tuple(rows), noise=noise, doubts=odd, records=records)


_Judged = Sequence[tuple[float, Conclusion]]


def _judged(targets: Sequence[Target], calls: Sequence[_Call], rules: Rules) -> _Judged:
    return [(one.effect, conclude(targets, one.first, one.fresh, rules)) for one in calls]


def _counts(judged: _Judged, case: str | None = None) -> dict[float, Counter[str]]:
    """Verdicts by slowdown, of one case or all."""
    found: dict[float, Counter[str]] = {}
    for effect, conclusion in judged:
        counts = found.setdefault(effect, Counter())
        counts.update(one.verdict for one in conclusion.outcomes if case in (None, one.name))
    return dict(sorted(found.items()))


def _noise(
    options: Options, targets: Sequence[Target], calls: Sequence[_Call], judged: _Judged
) -> Noise:
    """What the calls without a slowdown say of each case."""
    same: dict[str, list[Comparison]] = {}
    for call in calls:
        for one in comparisons(targets, call.first) if not call.effect else ():
            same.setdefault(one.name, []).append(one)
    versions = next((dict(one.versions) for call in calls for one in call.first), {})
    cases = {
        one.name: measured(
            same[one.name],
            _counts(judged, one.name),
            workload=one.workload,
            layer=one.layer,
            format=one.format,
            m=one.m,
            dtype=one.dtype,
            kernel=one.kernel,
            versions=versions,
        )
        for one in targets
        if one.name in same
    }
    return Noise(Machine.of(options.where), cases)
