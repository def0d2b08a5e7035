"""Results set against each other: which series may be compared, their ratios, and means of these.

The first source is the base. A ratio is a time over the base's time: below 1 is faster. Series are
compared where all conditions agree (device, timer, cache of each operand, threads, dtype, codes);
what ran (code, config, versions) may differ, since that is what is compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.compare.intervals import Estimate, median, quotient
from bench.compare.series import Case, Series, Source
from vqkernels.errors import VqError

__all__ = [
    "SORTS",
    "Comparison",
    "Differences",
    "IncomparableError",
    "Match",
    "against",
    "compare",
    "describe",
    "select",
]

Differences = Mapping[str, tuple[str | None, str | None]]

SORTS = ("run", "name", "median", "ratio")

# Conditions whose values are too long for a line.
_LONG = ("spec", "layers")


class IncomparableError(VqError):
    """Results that were not measured alike."""


@dataclasses.dataclass(kw_only=True)
class Match:
    """One case, with the series of each source that measured it under the same conditions.

    All by the sources' letters. differs: conditions that don't agree with the base's. ratios: of
    the time to the base's, or to that of the reference kernel.
    """

    case: Case
    series: dict[str, Series] = dataclasses.field(default_factory=dict)
    differs: dict[str, Differences] = dataclasses.field(default_factory=dict)
    ratios: dict[str, Estimate] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> Series | None:
        """The series of the base; where it has none, of the first source that has one."""
        return next(iter(self.series.values()), None)

    def status(self, source: Source) -> tuple[str, str]:
        """How the case ended in a source, with the reason: `absent` where it has no such record."""
        if source.letter in self.series:
            return "ok", ""
        dtype = self.first.conditions["dtype"] if self.first else None
        for status, reason, its in source.untimed.get(self.case, ()):
            if dtype in (None, its):
                return status, reason
        return "absent", ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sources, the base first, and their matches.

    reference: the kernel whose time stands for the base's, in the same run.
    """

    sources: Sequence[Source]
    matches: Sequence[Match]
    reference: str | None = None


def compare(sources: Sequence[Source], *, anyway: bool = False) -> Comparison:
    """Every case of every source, with its ratios to the first source.

    anyway: compare what was measured under other conditions too, and keep how they differ. Raises
    IncomparableError where there is such a case and `anyway` is not set, or no case in common.
    """
    base, *others = sources
    cases = [case for source in sources for case in (*source.series, *source.untimed)]
    found: dict[Case, list[Match]] = {
        case: [Match(case=case, series={base.letter: one}) for one in _newest_first(base, case)]
        for case in dict.fromkeys(cases)
    }
    for other in others:
        for case, matches in found.items():
            _pair(base, other, case, matches)
        if not anyway:
            _refuse(base, other, found)
    everything = [
        match for case, matches in found.items() for match in matches or [Match(case=case)]
    ]
    for other in others:
        _set_ratios(base, other, everything)
        if not any(other.letter in match.ratios for match in everything):
            raise IncomparableError(
                f"{base.name} and {other.name}: no case is timed in both; "
                f"compare runs of the same workloads, formats, m and kernels"
            )
    return Comparison(sources=sources, matches=everything)


def _newest_first(source: Source, case: Case) -> list[Series]:
    return sorted(source.series.get(case, ()), key=lambda one: one.newest, reverse=True)


def _pair(base: Source, other: Source, case: Case, matches: list[Match]) -> None:
    """Give each of `other`'s series of a case its match: one measured alike, else a new one.

    Where the base has the case under other conditions alone, they meet in spite of them. Of several
    that fit, those of the same code and config meet, then the newest.
    """
    theirs = _newest_first(other, case)
    steps = sorted(
        (len(first.differences(one)), _changes(first, one), i, j)
        for i, match in enumerate(matches)
        for j, one in enumerate(theirs)
        if (first := match.first) and (base.letter in match.series or not first.differences(one))
    )
    alike = [step for step in steps if not step[0]]
    paired: set[int] = set()
    for _, _, i, j in alike or steps:
        match, one = matches[i], theirs[j]
        if j in paired or other.letter in match.series:
            continue
        paired.add(j)
        assert match.first
        if differences := match.first.differences(one):
            match.differs[other.letter] = differences
        match.series[other.letter] = one
    matches += [
        Match(case=case, series={other.letter: one})
        for j, one in enumerate(theirs)
        if j not in paired
    ]


def _changes(one: Series, other: Series) -> int:
    return (one.config != other.config) + (one.code != other.code)


def _refuse(base: Source, other: Source, found: Mapping[Case, Sequence[Match]]) -> None:
    matches = [match for some in found.values() for match in some if other.letter in match.series]
    differing = [match.differs[other.letter] for match in matches if other.letter in match.differs]
    if differing:
        raise IncomparableError(
            f"{base.name} and {other.name} can't be compared: {len(differing)} of {len(matches)} "
            f"cases differ in {describe(differing)}; choose others by -w, -l, -f, -k, -m or "
            f"--dtype, or compare them --anyway"
        )


def describe(differing: Iterable[Differences]) -> str:
    """All differences in words, each with the base's value and the other's."""
    values: dict[str, dict[str, None]] = {}
    for differences in differing:
        for name, pair in differences.items():
            shown = "" if name in _LONG else ", ".join(str(value or "-") for value in pair)
            values.setdefault(name, {})[shown] = None
    names: dict[str, list[str]] = {}
    for name, pairs in values.items():
        names.setdefault("; ".join(pairs), []).append(name)
    texts = [
        # operands that were all hot and all cold are named together
        ", ".join(some).replace(", cache of ", "/") + (f" ({pairs})" if pairs else "")
        for pairs, some in names.items()
    ]
    return ", ".join(texts)


# ------------------------------------------------------------------------------------------------
# ratios


def _set_ratios(base: Source, other: Source, matches: Sequence[Match]) -> None:
    """The sides of a gate's file ran in pairs, of which each gives a ratio; other files did not."""
    paired = bool(base.side and other.side) and base.path == other.path
    for match in matches:
        if base.letter in match.series and other.letter in match.series:
            over, under = match.series[other.letter], match.series[base.letter]
            common = _common(over, under) if paired else []
            match.ratios[other.letter] = _ratio(over, under, common)


def against(source: Source, kernel: str) -> Comparison:
    """Every case of a source, and its ratio to `kernel` on the same product in the same run.

    Where several runs have both, the median of their ratios. Raises VqError where the source has no
    time of `kernel`.
    """
    references: dict[Case, list[Series]] = {}
    for case in source.series:
        if case.kernel == kernel:
            references[dataclasses.replace(case, kernel="")] = _newest_first(source, case)
    if not references:
        kernels = ", ".join(dict.fromkeys(case.kernel for case in source.series))
        raise VqError(f"{source.name}: no time of {kernel}; --against takes one of: {kernels}")
    matches = compare([source]).matches
    for match in matches:
        one = match.first
        if one is None or match.case.kernel == kernel:
            continue
        for reference in references.get(dataclasses.replace(match.case, kernel=""), ()):
            common = _common(one, reference)
            if common and not reference.differences(one):
                match.ratios[source.letter] = _ratio(one, reference, common)
                break
    return Comparison(sources=[source], matches=matches, reference=kernel)


def _common(one: Series, other: Series) -> list[tuple[str, int]]:
    return [run for run in one.samples_s if run in other.samples_s]


def _ratio(over: Series, under: Series, common: Sequence[tuple[str, int]]) -> Estimate:
    """Of times that were taken in `common` runs, run by run; of all, where none are in common."""
    if len(common) > 1:
        mine, theirs = over.medians, under.medians
        return median([mine[run] / theirs[run] for run in common])
    if common:
        over, under = over.only(common), under.only(common)
    return quotient(over.values, under.values)


def select(found: Comparison, statuses: Sequence[str], sort: str) -> Comparison:
    """The cases that ended in one of `statuses` in some source (all, where empty), in order.

    sort: `run` as measured, `name`, `median` fastest first, `ratio` slowest first.
    """
    keys: dict[str, Callable[[Match], Any]] = {
        "run": lambda _: 0,
        "name": lambda match: [str(value).zfill(12) for value in dataclasses.astuple(match.case)],
        "median": lambda match: match.first.median.value if match.first else math.inf,
        "ratio": lambda match: -max((one.value for one in match.ratios.values()), default=0.0),
    }
    matches = [
        match
        for match in found.matches
        if not statuses or any(match.status(source)[0] in statuses for source in found.sources)
    ]
    return dataclasses.replace(found, matches=sorted(matches, key=keys[sort]))
