"""Comparisons as rows for machines, and as the tables and lines that people read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.compare.intervals import LEVEL, Estimate, geometric_mean
from bench.compare.match import Comparison, Match, describe
from bench.compare.series import Case, Series, Source
from bench.tables import render

__all__ = ["BY", "case_rows", "case_table", "group_rows", "group_table", "legend", "notes"]

Row = dict[str, Any]

BY = ("workload", "layer", "format", "m", "kernel")

# Of many lines of one sort, those that are printed; the machine forms have all.
_MOST_LINES = 10

# Conditions that are shown; layers and spec are in the names of layer and format.
_SHOWN = ("device", "threads", "pinned", "timer", "cache", "dtype", "codes")
_CACHE = "cache of "
_ENDS = ("", "_low", "_high")
_SURE = f"{100 * LEVEL:.0f} %"


def case_rows(found: Comparison) -> list[Row]:
    """A row for each case and source, with all that is known of it."""
    return [_row(match, source) for match in found.matches for source in found.sources]


def _row(match: Match, source: Source) -> Row:
    letter = source.letter
    one, differs = match.series.get(letter), match.differs.get(letter)
    status, reason = match.status(source)
    return {
        "source": letter,
        "path": str(source.path),
        "side": source.side or None,
        **dataclasses.asdict(match.case),
        **(_conditions(one) if one else dict.fromkeys(_SHOWN)),
        "status": status,
        "reason": reason,
        **_measured(one),
        **_estimate("ratio", match.ratios.get(letter)),
        "differs": describe([differs]) if differs else None,
    }


def _conditions(one: Series) -> dict[str, str | None]:
    cache = " ".join(
        f"{name.removeprefix(_CACHE)}={state}"
        for name, state in one.conditions.items()
        if name.startswith(_CACHE)
    )
    return {name: cache if name == "cache" else one.conditions.get(name) for name in _SHOWN}


def _measured(one: Series | None) -> Row:
    us = Estimate(*(v and v * 1e6 for v in dataclasses.astuple(one.median))) if one else None
    return {
        "config": one and one.config,
        "code": one and one.code,
        "records": one and len(one.samples_s),
        "samples": one and sum(len(samples) for samples in one.samples_s.values()),
        **_estimate("median_us", us),
        "spread_percent": one and 100 * one.spread,
    }


def _estimate(name: str, found: Estimate | None) -> Row:
    values = dataclasses.astuple(found) if found else (None, None, None)
    return {f"{name}{end}": value for end, value in zip(_ENDS, values, strict=True)}


def group_rows(found: Comparison, by: Sequence[str]) -> list[Row]:
    """Geometric means of the ratios of each source, over all cases or groups of them.

    deviation: geometric standard deviation, a factor. faster, slower: cases whose whole interval
    lies below or above 1; unclear: the rest. low, high: of the mean, None of a single case.
    """
    rows = []
    for source in found.sources:
        groups: dict[tuple[Any, ...], list[Estimate]] = {}
        for match in found.matches:
            if ratio := match.ratios.get(source.letter):
                values = tuple(getattr(match.case, name) for name in by)
                groups.setdefault(values, []).append(ratio)
        head = {"source": source.letter, "path": str(source.path), "side": source.side or None}
        rows += [
            {**head, **dict(zip(by, values, strict=True)), **_group(ratios)}
            for values, ratios in groups.items()
        ]
    return rows


def _group(ratios: Sequence[Estimate]) -> Row:
    found = geometric_mean([ratio.value for ratio in ratios])
    faster = sum(ratio.high is not None and ratio.high < 1 for ratio in ratios)
    slower = sum(ratio.low is not None and ratio.low > 1 for ratio in ratios)
    return {
        "cases": len(ratios),
        **_estimate("geomean", found.mean),
        "deviation": found.deviation,
        "faster": faster,
        "slower": slower,
        "unclear": len(ratios) - faster - slower,
    }


# ------------------------------------------------------------------------------------------------
# tables for people


def case_table(found: Comparison, output: str, *, statuses: bool = False) -> str:
    """A row a case, with all sources side by side. statuses: with how it ended in each, and why.

    Unless statuses are asked for, what no source has timed is left out. Empty without rows.
    """
    matches = [match for match in found.matches if match.series or statuses]
    telling = _telling(matches)
    rows = [_wide(match, found, telling[match.case]) for match in matches]
    conditions = _values([match.first for match in matches if match.first])
    columns = {"workload": "workload", "layer": "layer", "shape": "n x k", "format": "format"}
    columns |= {"m": "m", "kernel": "kernel"}
    # codes go with the workload: trained where its weights are real
    columns |= {
        name: name for name, some in conditions.items() if len(some) > 1 and name != "codes"
    }
    columns |= {name: name for name in ("config", "code") if any(row[name] for row in rows)}
    for source in found.sources:
        columns |= _columns(found, source, matches, statuses=statuses)
    return render(rows, columns, output) if rows else ""


def _telling(matches: Sequence[Match]) -> dict[Case, set[str]]:
    """Of each case, which of config and code tell its rows apart."""
    configs: dict[Case, set[str]] = {match.case: set() for match in matches}
    codes: dict[Case, set[str | None]] = {match.case: set() for match in matches}
    for match in matches:
        if match.first:
            configs[match.case].add(match.first.config)
            codes[match.case].add(match.first.code)
    return {
        case: {
            name for name, values in (("config", configs), ("code", codes)) if len(values[case]) > 1
        }
        for case in configs
    }


def _prefix(found: Comparison, source: Source) -> str:
    """What tells a source's columns apart, where there are several."""
    return f"{source.letter} " if len(found.sources) > 1 else ""


def _columns(
    found: Comparison, source: Source, matches: Sequence[Match], *, statuses: bool
) -> dict[str, str]:
    letter, prefix = source.letter, _prefix(found, source)
    columns = {f"{letter} us": f"{prefix}median us", f"{letter} bounds": f"{prefix}{_SURE}"}
    if len(found.sources) == 1:
        columns[f"{letter} spread"] = "spread %"
    if any(len(match.series[letter].samples_s) > 1 for match in matches if letter in match.series):
        columns[f"{letter} records"] = f"{prefix}records"
    if found.reference or source is not found.sources[0]:
        name = _ratio_name(found, source)
        columns |= {f"{letter} ratio": name, f"{letter} ratio bounds": f"{name} {_SURE}"}
    differing = [match.differs.get(letter) for match in matches if letter in match.ratios]
    if any(one != differing[0] for one in differing):  # else the legend says it for all
        columns[f"{letter} differs"] = f"{prefix}differs"
    if statuses:
        columns |= {f"{letter} status": f"{prefix}status", f"{letter} reason": f"{prefix}reason"}
    return columns


def _ratio_name(found: Comparison, source: Source) -> str:
    under = found.reference or found.sources[0].letter
    return f"time/{under}" if found.reference else f"{source.letter}/{under}"


def _wide(match: Match, found: Comparison, telling: set[str]) -> Row:
    """A case's cells. telling: which of config and code tell it from other rows of the case."""
    row = dataclasses.asdict(match.case)
    row["shape"] = f"{match.case.n}x{match.case.k}" if match.case.n else None
    row |= _conditions(match.first) if match.first else dict.fromkeys(_SHOWN)
    configs = {letter: one.config for letter, one in match.series.items()}
    codes = {letter: (one.code or "-")[:8] for letter, one in match.series.items()}
    row["config"] = _ran(configs, told="config" in telling)
    row["code"] = _ran(codes, told=True) if "code" in telling else ""
    for source in found.sources:
        letter = source.letter
        row[f"{letter} status"], row[f"{letter} reason"] = match.status(source)
        if one := match.series.get(letter):
            us = Estimate(*(v and v * 1e6 for v in dataclasses.astuple(one.median)))
            row |= {f"{letter} us": _us(us.value), f"{letter} bounds": _bounds(us, _us)}
            row |= {f"{letter} spread": 100 * one.spread, f"{letter} records": len(one.samples_s)}
        if ratio := match.ratios.get(letter):
            row[f"{letter} ratio"] = _factor(ratio.value)
            row[f"{letter} ratio bounds"] = _bounds(ratio, _factor)
        if differs := match.differs.get(letter):
            row[f"{letter} differs"] = describe([differs])
    return row


def _ran(values: Mapping[str, str], *, told: bool) -> str:
    """A config or code by source where they differ; else once, where it has to be told."""
    if len(set(values.values())) > 1:
        return "; ".join(f"{letter}: {value or 'none'}" for letter, value in values.items())
    return next(iter(values.values()), "") if told else ""


def group_table(found: Comparison, by: Sequence[str], output: str) -> str:
    """The geometric means in rows; empty without ratios."""
    sources = {source.letter: source for source in found.sources}
    rows = [
        {
            **row,
            "ratio": _ratio_name(found, sources[row["source"]]),
            "mean": _factor(row["geomean"]),
            "bounds": _bounds(Estimate(*(row[f"geomean{end}"] for end in _ENDS)), _factor),
            "deviation": row["deviation"] and _factor(row["deviation"]),
        }
        for row in group_rows(found, by)
    ]
    columns = {"ratio": "ratio"} | {name: name for name in by} | {"cases": "cases"}
    columns |= {"mean": "geometric mean", "bounds": _SURE, "deviation": "geometric std dev"}
    columns |= {name: name for name in ("faster", "slower", "unclear")}
    return render(rows, columns, output) if rows else ""


def _us(value: float) -> str:
    return f"{value:,.1f}" if value >= 1000 else f"{value:.4g}"


def _factor(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def _bounds(found: Estimate, form: Callable[[float], str]) -> str | None:
    if found.low is None or found.high is None:
        return None
    return f"{form(found.low)}–{form(found.high)}"


# ------------------------------------------------------------------------------------------------
# lines for people


def legend(found: Comparison) -> list[str]:
    """A line for each source, one for conditions that all cases share, and what forbids comparing.

    Conditions that vary are columns of the table.
    """
    lines = []
    for source in found.sources:
        counts = ", ".join(
            f"{count} {'refused' if status == 'constraint' else status}"
            for status, count in source.statuses.items()
        )
        commit = "/".join(sorted(source.facts.get("commit", ["unknown"])))
        number = sum(source.statuses.values())
        lines.append(f"{source.letter}: {source.name}: {number} records: {counts}; commit {commit}")
    values = _values([one for match in found.matches for one in match.series.values()])
    shared = {name: next(iter(some)) for name, some in values.items() if len(some) == 1}
    if shared:
        lines.append(", ".join(_in_words(shared)))
    for source in found.sources[1:]:
        letter = source.letter
        differs = [match.differs[letter] for match in found.matches if letter in match.differs]
        if differs:
            lines.append(
                f"NOT COMPARABLE: {letter} differs from {found.sources[0].letter} in "
                f"{describe(differs)} in {len(differs)} cases, which are compared anyway"
            )
    return lines


def _values(series: Sequence[Series]) -> dict[str, set[str | None]]:
    """All values of each condition that is shown."""
    values: dict[str, set[str | None]] = {name: set() for name in _SHOWN}
    for one in series:
        for name, value in _conditions(one).items():
            values[name].add(value)
    return values


def _in_words(shared: Mapping[str, str | None]) -> Iterator[str]:
    words = {"threads": "threads: {}", "pinned": "pinned: {}", "codes": "{} codes"}
    for name, value in shared.items():
        if value:
            yield _temperatures(value) if name == "cache" else words.get(name, "{}").format(value)


def _temperatures(cache: str) -> str:
    """`codes=cold x=hot out=hot` as `codes cold, x/out hot`."""
    operands: dict[str, list[str]] = {}
    for item in cache.split():
        name, _, state = item.partition("=")
        operands.setdefault(state, []).append(name)
    return ", ".join(f"{'/'.join(names)} {state}" for state, names in operands.items())


def notes(found: Comparison) -> list[str]:
    """What a reader should know of a comparison besides its numbers."""
    if not found.matches:
        return ["no case ended so"]
    lines = [line for source in found.sources[1:] for line in _between(found, source)]
    lines += [line for source in found.sources for line in _ended(found, source)]
    if found.reference:
        lines += _unset(found)
    ratios = [ratio for match in found.matches for ratio in match.ratios.values()]
    if missing := sum(ratio.low is None for ratio in ratios):
        lines.append(f"{missing} ratios have no interval: they rest on too few samples or records")
    if ratios:
        lines.append(
            "ratios are of times: below 1 is faster; faster, slower: the whole interval is on that "
            "side of 1"
        )
    if len(found.sources) > 1:
        return [
            *lines,
            "intervals are of these runs alone, and the ratios hold what changed in the machine "
            "between them: `vqbench gate` decides whether something got slower",
        ]
    return [*lines, "intervals are of these samples alone: another process may differ by more"]


def _between(found: Comparison, other: Source) -> Iterator[str]:
    """How a source differs from the base."""
    base = found.sources[0]
    noted = {
        name: (_joined(base, name), _joined(other, name))
        for name in dict.fromkeys((*base.facts, *other.facts))
        if base.facts.get(name) != other.facts.get(name)
    }
    code = ", ".join(
        dict.fromkeys(
            match.case.kernel
            for match in found.matches
            if other.letter in match.ratios
            and match.series[base.letter].code != match.series[other.letter].code
        )
    )
    texts = [text for text in (describe([noted]), code and f"code of {code}") if text]
    if texts:
        yield f"{other.letter} differs from {base.letter}, noted only, in: {', '.join(texts)}"


def _joined(source: Source, name: str) -> str:
    return "/".join(sorted(source.facts.get(name, ())))


def _unset(found: Comparison) -> Iterator[str]:
    """How many cases have no ratio to the reference kernel."""
    count = sum(
        bool(match.series) and not match.ratios and match.case.kernel != found.reference
        for match in found.matches
    )
    if count:
        yield (
            f"{count} cases have no ratio: {found.reference} was not timed on the same product, "
            f"under the same conditions and in the same run"
        )


def _ended(found: Comparison, source: Source) -> list[str]:
    """Cases that failed in a source or that it lacks, and why kernels refused the others."""
    timed: dict[tuple[Case, str | None], dict[str, None]] = {}
    for match in found.matches:
        for letter, one in match.series.items():
            timed.setdefault((match.case, one.conditions["dtype"]), {})[letter] = None
    lines: list[str] = []
    refused: Counter[str] = Counter()
    for case in dict.fromkeys(match.case for match in found.matches):
        for (status, reason, dtype), count in source.untimed.get(case, {}).items():
            beside = ", ".join(timed.get((case, dtype), ()))
            if beside or status not in ("checked", "constraint"):
                ok = f"; ok in {beside}" if beside else ""
                lines.append(f"{count} x {case} {dtype}: {status}: {reason or 'not timed'}{ok}")
            elif status == "constraint":
                refused[f"{case.kernel}: {reason}"] += count
    lines = [f"{source.letter}: {line}" for line in _few(lines)]
    if len(found.sources) == 1:
        lines += _few([f"refused: {count} x {line}" for line, count in refused.most_common()])
    absent = sum(match.status(source)[0] == "absent" for match in found.matches)
    return [*lines, *([f"{source.letter}: lacks {absent} cases of the table"] if absent else [])]


def _few(lines: list[str]) -> list[str]:
    rest = len(lines) - _MOST_LINES
    return lines if rest <= 0 else [*lines[:_MOST_LINES], f"and {rest} more: -o csv has all"]
