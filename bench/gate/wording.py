"""What each form of a gate's report says of its cases, in words and in one order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from bench.gate.outcome import EXIT, Outcome, Report
from bench.validity import grouped

__all__ = [
    "ADVICE",
    "ORDER",
    "closing",
    "counts",
    "doubts",
    "effect",
    "explained",
    "label",
    "listed",
    "meaning",
    "ordered",
    "plain",
    "reason",
    "skipped",
    "times",
]

# Gravest first. A wrong case is called that, whatever verdict it has.
ORDER: tuple[str, ...] = (
    "WRONG",
    "REGRESSED",
    "INVALID",
    "INCONCLUSIVE",
    "FASTER",
    "PASS",
    "IDENTICAL",
)

ADVICE = (
    "ADVISORY: held against a stored baseline, measured at another time: no verdict on speed here "
    "fails a build"
)

_MEANING = {
    EXIT["pass"]: "passed",
    EXIT["regressed"]: "slower",
    EXIT["wrong"]: "wrong results",
    EXIT["invalid"]: "no verdict",
}


def plain(text: str) -> str:
    """One line of printable characters: white space as single spaces, the rest as escapes.

    Names and reasons are data: a line break, a terminal's control sequence or a half of a surrogate
    pair in them must not reach a table, a terminal or XML.
    """
    line = " ".join(text.split())
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in line
    )


def label(one: Outcome) -> str:
    """The word of `ORDER` for this case."""
    return "WRONG" if one.wrong else one.verdict


def ordered(report: Report) -> list[Outcome]:
    """The gravest verdict first; within one verdict by ratio, the slowest first."""
    return sorted(
        report.outcomes, key=lambda one: (ORDER.index(label(one)), -(one.ratio or 0.0), one.name)
    )


def counts(report: Report) -> dict[str, int]:
    """How many cases have each label, of those that occur; the gravest first."""
    found = Counter(label(one) for one in report.outcomes)
    return {word: found[word] for word in ORDER if found[word]}


def explained(report: Report) -> list[Outcome]:
    """The cases whose reason is printed: no PASS or IDENTICAL, but where pairs were run again."""
    quiet = ("PASS", "IDENTICAL")
    return [
        one for one in ordered(report) if label(one) not in quiet or one.first_ratio is not None
    ]


def reason(one: Outcome) -> str:
    """Why the case has its verdict, and for INCONCLUSIVE what could have been seen."""
    parts = [plain(one.reason)]
    if one.verdict == "INCONCLUSIVE" and not one.wrong and one.smallest is not None:
        parts.append(effect(one.smallest))
    if one.noise is not None:
        parts.append(f"differs from itself by {_percent(one.noise)}")
    return "; ".join(parts)


def effect(smallest: float) -> str:
    """What slowdown these pairs would have called."""
    if math.isinf(smallest):
        return "no slowdown would have been called"
    return f"slowdowns of {_percent(smallest)} and more would have been called"


def times(one: Outcome) -> str:
    """The numbers of a case in one line; empty without a measurement."""
    parts = []
    for name, time_s in (("baseline", one.baseline_s), ("candidate", one.candidate_s)):
        if time_s is not None:
            parts.append(f"{name} {time_s * 1e6:.4g} us")
    if one.ratio is not None:
        bounds = (one.low, one.high)
        shown = [f"{bound:.3f}" for bound in bounds if bound is not None]
        parts.append(f"ratio {one.ratio:.3f}" + (f" ({' to '.join(shown)})" if shown else ""))
    if parts and one.smallest is not None:
        parts.append(f"smallest detectable {_percent(one.smallest)}")
    if parts and one.pairs:
        parts.append(f"{one.pairs} pairs")
    return ", ".join(parts)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):,.1f} %"


def doubts(report: Report) -> dict[str, int]:
    """In how many cases each doubt came up, the most frequent first."""
    return grouped([plain(text) for text in one.doubts] for one in report.outcomes)


def skipped(report: Report) -> dict[str, list[str]]:
    """The names of skipped cases by reason, the most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for name, why in report.skipped.items():
        groups.setdefault(plain(why), []).append(plain(name))
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def closing(report: Report) -> str:
    """What it comes to: the cases that decide, and the exit code."""
    return f"{_finding(report)}; exit code {report.exit_code} ({meaning(report)})"


def meaning(report: Report) -> str:
    """The exit code in a word or two."""
    code = report.exit_code
    return "advisory" if report.advisory and code == EXIT["pass"] else _MEANING[code]


def _finding(report: Report) -> str:
    total = len(report.outcomes)
    if not total:
        return f"no case was compared, {len(report.skipped)} skipped"
    names: dict[str, list[str]] = {}
    for one in ordered(report):
        names.setdefault(label(one), []).append(plain(one.name))
    grave = [word for word in ORDER[:3] if word in names]
    if "INCONCLUSIVE" in names and (report.strict or not grave):
        grave.append("INCONCLUSIVE")
    if not grave:
        return f"no case is slower, {total} compared"
    return "; ".join(
        f"{len(names[word])} of {total} cases {word}: {listed(names[word])}" for word in grave
    )
