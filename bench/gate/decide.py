"""From samples to verdicts: which cases can be judged, and what the rule says of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from autotune.measurement import Measurement
from autotune.verdict import Comparison, Judgement, judge, settle
from autotune.verdict import suspects as _suspects
from bench.gate.job import ABSENT, Target
from bench.gate.journal import Sample
from bench.gate.noise import Noise
from bench.gate.outcome import Outcome
from bench.gate.sides import SIDES, Who
from bench.gate.thresholds import Thresholds
from bench.validity import doubts, forbids

__all__ = ["Conclusion", "Rules", "comparisons", "conclude", "suspects"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How cases are judged: what counts as slower, and by how much a case differs from itself.

    identical: what is the same code on both sides is never called slower.
    """

    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)
    noise: Noise | None = None
    identical: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conclusion:
    """A call's outcomes, cases there is nothing to compare in, and what is to be said of all."""

    outcomes: tuple[Outcome, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]


def comparisons(targets: Sequence[Target], samples: Sequence[Sample]) -> list[Comparison]:
    """The pairs of all cases that can be judged."""
    cases = _cases(targets, samples)
    return [one.comparison(Rules()) for one in cases if one.problem() is None]


def suspects(
    targets: Sequence[Target], samples: Sequence[Sample], rules: Rules
) -> tuple[Target, ...]:
    """The cases that look slower: what fresh pairs have to confirm."""
    usable = [one for one in _cases(targets, samples) if one.problem() is None]
    names = {
        one.name
        for group in _groups(usable, rules)
        for one in _suspects([case.comparison(rules) for case in group], rules.thresholds.rule)
    }
    return tuple(target for target in targets if target.name in names)


def conclude(
    targets: Sequence[Target], first: Sequence[Sample], fresh: Sequence[Sample], rules: Rules
) -> Conclusion:
    """What a call ends with. fresh: samples of the cases that `suspects` named."""
    cases = _cases(targets, first)
    skipped = {one.name: reason for one in cases if (reason := one.skipped())}
    cases = [one for one in cases if one.name not in skipped]
    again = {one.name: one for one in _cases(targets, fresh) if one.samples}
    sound = {one.name: one.problem() or _again_problem(again.get(one.name)) for one in cases}
    judged: dict[str, Judgement] = {}
    for group in _groups([one for one in cases if sound[one.name] is None], rules):
        begun = [one.comparison(rules) for one in group]
        fresh_pairs = [again[one.name].comparison(rules) for one in group if one.name in again]
        settled = settle(begun, fresh_pairs, rules.thresholds.rule)
        judged |= {one.name: one for one in settled}
    outcomes = [
        _outcome(one, again.get(one.name), sound[one.name], judged.get(one.name), rules)
        for one in cases
    ]
    return _controlled(outcomes, skipped, judged)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Why a case can't be judged; wrong: see Outcome."""

    reason: str
    wrong: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """A case with its samples by side, in the order of their pairs."""

    target: Target
    sides: Mapping[Who, tuple[Sample, ...]]

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(one for who in SIDES for one in self.sides[who])

    @property
    def identical(self) -> bool:
        """Whether both sides run the same machine code on the same input."""
        found = {one.identity for one in self.samples}
        return len(found) == 1 and "" not in found

    def failure(self, who: Who) -> Measurement | None:
        """A side's first attempt that isn't ok."""
        measured = (one.measurement for one in self.sides[who])
        return next((one for one in measured if one.status != "ok"), None)

    def skipped(self) -> str | None:
        """Why there is nothing to compare: a refusal on both sides, or a kernel that is new."""
        before, now = self.failure("baseline"), self.failure("candidate")
        if before is None or before.status != "constraint":
            return None
        if now is not None and now.status == "constraint":
            return now.reason
        if now is not None:
            return None
        return f"new: the baseline says: {before.reason}"

    def problem(self) -> _Problem | None:
        """Why no verdict is possible; None where one is."""
        before, now = self.failure("baseline"), self.failure("candidate")
        if now is not None:
            lost = "is gone" if now.reason == ABSENT else f"{now.status}: {now.reason}"
            wrong = now.status == "incorrect" or before is None
            return _Problem(f"candidate: {lost}", wrong=wrong)
        if before is not None:
            return _Problem(f"baseline: {before.status}: {before.reason}")
        if reason := self._forbidden() or self._changed():
            return _Problem(reason)
        return None

    def _forbidden(self) -> str | None:
        found = [reasons for one in self.samples if (reasons := forbids(*self._states(one)))]
        return (
            f"{found[0][0]} (in {len(found)} of {len(self.samples)} processes)" if found else None
        )

    def _changed(self) -> str | None:
        for who, samples in self.sides.items():
            if len({one.identity for one in samples}) > 1:
                return f"the {who}'s code or compilers changed while it was measured"
        if len({(one.device.get("name"), one.device.get("uuid")) for one in self.samples}) > 1:
            return "its processes ran on different devices"
        return None

    def doubts(self) -> tuple[str, ...]:
        """What was odd, each once."""
        found = (reason for one in self.samples for reason in doubts(*self._states(one)))
        return tuple(dict.fromkeys(found))

    def _states(self, one: Sample) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Before and after; what the pair's other process did meanwhile is no stranger's."""
        before, after = one.state.get("before", {}), one.state.get("after", {})
        if "own_cpu_s" not in after:
            return before, after
        others = [o for o in self.samples if o.pair == one.pair and o.side != one.side]
        spent = after["own_cpu_s"] + sum(_own_cpu_s(other) for other in others)
        return before, {**after, "own_cpu_s": spent}

    def medians(self, who: Who) -> list[float]:
        """Of each process of a side, in seconds."""
        return [one.measurement.median_s for one in self.sides[who]]

    def comparison(self, rules: Rules) -> Comparison:
        """The pairs, with what counts as slower here."""
        limits = rules.thresholds.limits(self.target)
        return Comparison(
            name=self.name,
            pairs=tuple(zip(*(self.medians(who) for who in SIDES), strict=True)),
            noise=rules.noise.floor(self.name) if rules.noise else 1.0,
            ratio=limits.ratio,
            seconds=limits.seconds,
        )


def _own_cpu_s(one: Sample) -> float:
    before, after = one.state.get("before", {}), one.state.get("after", {})
    return float(after.get("own_cpu_s", 0.0) - before.get("own_cpu_s", 0.0))


def _cases(targets: Sequence[Target], samples: Sequence[Sample]) -> list[_Case]:
    found: dict[str, list[Sample]] = {target.name: [] for target in targets}
    for one in sorted(samples, key=lambda one: one.pair):
        found[one.case].append(one)
    return [
        _Case(
            target=target,
            sides={
                who: tuple(one for one in found[target.name] if one.side == who) for who in SIDES
            },
        )
        for target in targets
    ]


def _again_problem(fresh: _Case | None) -> _Problem | None:
    return fresh.problem() if fresh is not None else None


def _groups(cases: Sequence[_Case], rules: Rules) -> list[list[_Case]]:
    """Those that may be called slower, and those that are the same code on both sides.

    Holm's family is the first: that the others don't differ is known, and they are judged apart,
    as controls.
    """
    same = [one for one in cases if rules.identical and one.identical]
    return [[one for one in cases if one not in same], same]


def _outcome(
    case: _Case,
    again: _Case | None,
    problem: _Problem | None,
    judged: Judgement | None,
    rules: Rules,
) -> Outcome:
    target, limits = case.target, rules.noise
    known = {
        name: getattr(target, name)
        for name in ("workload", "layer", "format", "n", "k", "m", "dtype", "kernel")
    }
    doubtful = tuple(dict.fromkeys([*case.doubts(), *(again.doubts() if again else ())]))
    if judged is None:
        assert problem is not None, "what has no problem is judged"
        return Outcome(
            **known,
            verdict="INVALID",
            reason=problem.reason,
            wrong=problem.wrong,
            doubts=doubtful,
        )
    both = [case, *([again] if again else [])]
    medians = {who: [one for part in both for one in part.medians(who)] for who in SIDES}
    same = rules.identical and case.identical
    return Outcome(
        **known,
        verdict="IDENTICAL" if same else judged.verdict,
        reason=f"the same code on both sides: {judged.reason}" if same else judged.reason,
        baseline_s=statistics.median(medians["baseline"]),
        candidate_s=statistics.median(medians["candidate"]),
        ratio=judged.ratio,
        low=judged.low,
        high=judged.high,
        smallest=judged.smallest,
        noise=limits.floor(target.name) if limits else None,
        pairs=len(medians["baseline"]),
        first_ratio=_first_ratio(case, rules) if again else None,
        doubts=doubtful,
    )


def _first_ratio(case: _Case, rules: Rules) -> float:
    (judgement,) = judge([case.comparison(rules)], rules.thresholds.rule)
    return judgement.ratio


def _controlled(
    outcomes: Sequence[Outcome], skipped: Mapping[str, str], judged: Mapping[str, Judgement]
) -> Conclusion:
    """The conclusion, unless a control says that this machine can't be believed now."""
    failed = [
        one
        for one in outcomes
        if one.verdict == "IDENTICAL" and judged[one.name].verdict == "REGRESSED"
    ]
    if not failed:
        return Conclusion(outcomes=tuple(outcomes), skipped=skipped, notes=())
    control = failed[0]
    reason = f"{control.name}, the same code on both sides, came out {control.ratio:.3f}x"
    changed = [
        dataclasses.replace(one, verdict="INVALID", reason=f"{one.reason}; but {reason}")
        if one.verdict in ("REGRESSED", "FASTER")
        else one
        for one in outcomes
    ]
    note = f"no difference can be believed: {reason}"
    return Conclusion(outcomes=tuple(changed), skipped=skipped, notes=(note,))
