"""What a gate concludes: a verdict for each case, and the exit code of them all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal, get_args

__all__ = ["EXIT", "Outcome", "Report", "Verdict"]

# IDENTICAL: both sides run the same code on the same input; measured all the same, as a control.
# INVALID: no verdict is possible (a side failed or is wrong, or the machine changed meanwhile).
Verdict = Literal["IDENTICAL", "PASS", "FASTER", "REGRESSED", "INCONCLUSIVE", "INVALID"]

# Exit codes of `vqbench gate`; 2, of bad usage, is `vqbench`'s own.
EXIT = {"pass": 0, "regressed": 1, "wrong": 3, "invalid": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case. Times in seconds; ratios are candidate over baseline, 1 where nothing differs.

    reason: in words, always there. wrong: the candidate gives wrong results, or doesn't run where
    the baseline did. baseline_s, candidate_s: median over the processes of their medians; None
    without a measurement. low, high: one-sided t bounds of the mean ratio. smallest: the least
    slowdown that these pairs would have called. noise: the ratio by which this case differs from
    itself, of a stored selfcheck; None without one. pairs: of processes the verdict rests on.
    first_ratio: of the first pairs, where fresh ones had to confirm them. doubts: what was odd
    about the machine meanwhile, without forbidding a verdict.
    """

    workload: str
    layer: str
    format: str
    n: int
    k: int
    m: int
    dtype: str
    kernel: str
    verdict: Verdict
    reason: str
    wrong: bool = False
    baseline_s: float | None = None
    candidate_s: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    smallest: float | None = None
    noise: float | None = None
    pairs: int = 0
    first_ratio: float | None = None
    doubts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The case in one line."""
        return f"{self.workload} {self.layer} {self.format} m={self.m} {self.dtype} {self.kernel}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All cases of a call.

    baseline, candidate: what was compared, in words (a commit, a folder, a config). skipped: cases
    that there is nothing to compare in, with the reason. advisory: held against a stored baseline,
    which no verdict may fail a build on. notes: what a reader should know of the whole. records:
    the file of all samples. seconds: that it took. strict: what is inconclusive fails too. host:
    where it ran. started: when, as ISO 8601.
    """

    baseline: str
    candidate: str
    device: str
    outcomes: tuple[Outcome, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    records: str = ""
    seconds: float = 0.0
    advisory: bool = False
    strict: bool = False
    host: str = ""
    started: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """How many cases have each verdict, of those that occur."""
        found = Counter(one.verdict for one in self.outcomes)
        return {verdict: found[verdict] for verdict in get_args(Verdict) if found[verdict]}

    @property
    def exit_code(self) -> int:
        """0 pass, 1 slower, 3 wrong results, 4 no verdict possible (or none reached, if strict).

        The gravest wins: wrong results, then a regression. Advice fails no build, unless results
        are wrong. Where nothing was compared, there is no verdict.
        """
        if not self.outcomes:
            return EXIT["invalid"]
        codes = {self.code_of(one) for one in self.outcomes}
        grave = (EXIT[name] for name in ("wrong", "regressed", "invalid"))
        return next((code for code in grave if code in codes), EXIT["pass"])

    def code_of(self, one: Outcome) -> int:
        """The exit code that this case alone would give."""
        if one.wrong:
            return EXIT["wrong"]
        if self.advisory:
            return EXIT["pass"]
        if one.verdict == "REGRESSED":
            return EXIT["regressed"]
        if one.verdict == "INVALID" or (self.strict and one.verdict == "INCONCLUSIVE"):
            return EXIT["invalid"]
        return EXIT["pass"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, with what is derived."""
        return {
            **dataclasses.asdict(self),
            "counts": self.counts,
            "exit_code": self.exit_code,
        }
