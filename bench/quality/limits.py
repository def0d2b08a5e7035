"""Limits that a report has to keep: a gate for quality.

A limit is `NAME=VALUE`, `NAME<=VALUE` or `NAME>=VALUE`; with `=` the number may get no worse, which
of a measure is known. NAME is a measure of every layer (`relative_error`), of a model's layers
together (`total.relative_error`), or a number of a section's report by its path, in which a row of
a list goes by its name (`embedding.groups.all.cosine_min`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from bench.quality.measures import MEASURES
from bench.quality.report import Judged, Report
from vqkernels.errors import SpecError

__all__ = ["Limit", "beyond", "failed_canaries", "parse_limit"]

_FORM = re.compile(r"([\w.-]+)\s*(<=|>=|=)\s*([+-]?[\d.]+(?:e[+-]?\d+)?)", re.IGNORECASE)
_TOTAL = "total."


@dataclasses.dataclass(frozen=True)
class Limit:
    """`name` may not go over `value` (`<=`), or not under it (`>=`)."""

    name: str
    sense: Literal["<=", ">="]
    value: float

    @property
    def measure(self) -> str | None:
        """The measure that it is of; None for a number of a section."""
        found = self.name.removeprefix(_TOTAL)
        return found if found in MEASURES else None

    def kept(self, found: float) -> bool:
        """Whether `found` is within it; what is no number is not."""
        return found <= self.value if self.sense == "<=" else found >= self.value


def parse_limit(text: str) -> Limit:
    """The limit that `text` is. Raises SpecError for anything else."""
    match = _FORM.fullmatch(text.strip())
    try:
        name, sense, value = match[1], match[2], float(match[3])  # type: ignore[index]  # TypeError
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"limit {text!r} is none; write NAME=VALUE, e.g. relative_error=0.1"
        ) from error
    measure = name.removeprefix(_TOTAL)
    if measure not in MEASURES and ("." not in name or name.startswith(_TOTAL)):
        raise SpecError(
            f"limit {text!r}: nothing is called {measure!r}; there are {', '.join(MEASURES)}"
        )
    if sense == "=":
        if measure not in MEASURES:
            raise SpecError(f"limit {text!r}: say which way, with {name}<=VALUE or {name}>=VALUE")
        sense = "<=" if MEASURES[measure].better == "low" else ">="
    return Limit(name, "<=" if sense == "<=" else ">=", value)


def beyond(report: Report, limits: Sequence[Limit]) -> list[str]:
    """A line for each number of `report` that is beyond one of `limits`, or wasn't measured there.

    Raises SpecError for a limit of what no candidate has: a gate that judges nothing is none.
    """
    lines = []
    for limit in limits:
        found = [(where, value) for one in report.candidates for where, value in _found(one, limit)]
        if all(value is None for _, value in found):
            raise SpecError(
                f"limit {limit.name}: the report has no such number; ask for what measures it "
                f"(--calibration, --end-to-end, ...), or name another"
            )
        for where, value in found:
            if value is None:
                lines.append(f"{where}: {limit.name} was not measured")
            elif not limit.kept(value):
                lines.append(
                    f"{where}: {limit.name} {value:.6g} is not {limit.sense} {limit.value:g}"
                )
    return lines


def failed_canaries(report: Report) -> list[str]:
    """A line for each canary that a quantised model of `report` failed."""
    return [
        f"{one.label}: canary {row['name']!r}: {row['quantised']:.4g}, and has to be at least "
        f"{row['wanted']:.4g} (the dense model: {row['dense']:.4g})"
        for one in report.candidates
        for section in one.sections.values()
        for row in section.get("canaries", ())
        if not row["passed"]
    ]


def _found(one: Judged, limit: Limit) -> Iterator[tuple[str, float | None]]:
    """Where the limit's number stands in `one`, and the number."""
    if limit.measure is None:
        for value in _in_section(one.sections, limit.name):
            yield one.label, value
    elif limit.name.startswith(_TOTAL):
        yield one.label, one.totals[limit.measure]
    else:
        for layer in one.layers:
            yield f"{one.label}: {layer.layer}", layer.measures[limit.measure]


def _in_section(sections: Mapping[str, Mapping[str, Any]], path: str) -> list[float | None]:
    """The numbers at `path`; None for one that is no number."""
    name, *keys = path.split(".")
    found: list[Any] = [sections[name]["report"]] if name in sections else []
    for key in keys:
        found = [part for one in found for part in _parts(one, key)]
    return [float(one) if isinstance(one, int | float) else None for one in found] or [None]


def _parts(value: Any, key: str) -> list[Any]:
    """What `value` has under `key`; of a list, the rows that have this name among their texts."""
    if isinstance(value, Mapping):
        return [value[key]] if key in value else []
    if isinstance(value, list | tuple):
        return [row for row in value if isinstance(row, Mapping) and key in row.values()]
    return []
