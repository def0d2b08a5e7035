"""Thresholds of a gate, as a TOML file: the rule for all cases, and exceptions by glob.

[rule]              # any field of autotune.verdict.Rule
ratio = 1.03

[[case]]            # the first that matches a case decides on it
kernel = "cuda/*"   # also workload, layer, format (globs), m, dtype
ratio = 1.05        # what counts as slower there
seconds = 1e-6
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.verdict import Rule
from bench.gate.job import Target
from vqkernels.errors import ConfigError

__all__ = ["Limits", "Thresholds", "load_thresholds"]

_GLOBS = ("workload", "layer", "format", "kernel", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What counts as slower in the cases that `match` describes; None: as everywhere."""

    match: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ratio: float | None = None
    seconds: float | None = None

    def fits(self, case: Target) -> bool:
        """Whether they are those of `case`."""
        for name, wanted in self.match.items():
            value = getattr(case, name)
            same = value == wanted if name == "m" else fnmatch.fnmatchcase(value, wanted)
            if not same:
                return False
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The rule, and its exceptions in order."""

    rule: Rule = dataclasses.field(default_factory=Rule)
    cases: tuple[Limits, ...] = ()

    def limits(self, case: Target) -> Limits:
        """Those of a case."""
        return next((one for one in self.cases if one.fits(case)), Limits())


def load_thresholds(path: Path) -> Thresholds:
    """The thresholds in a file. Raises ConfigError naming what isn't one."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"thresholds {path}: {error}; give a TOML file") from error
    try:
        _known(table, {"rule", "case"})
        return Thresholds(
            rule=_rule(table.get("rule", {})),
            cases=tuple(_limits(one) for one in table.get("case", ())),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"thresholds {path}: {error}; see bench/gate/thresholds.py") from error


def _rule(table: Mapping[str, Any]) -> Rule:
    defaults = dataclasses.asdict(Rule())
    _known(table, set(defaults))
    for name, value in table.items():
        _number(name, value, whole=isinstance(defaults[name], int))
    rule = Rule(**table)
    if not (rule.ratio >= 1 and rule.bound >= 1 and 0 < rule.alpha < 1):
        raise ValueError("ratio and bound are of times, 1 or more; alpha lies between 0 and 1")
    return rule


def _limits(table: Mapping[str, Any]) -> Limits:
    _known(table, {*_GLOBS, "m", "ratio", "seconds"})
    match = {name: table[name] for name in (*_GLOBS, "m") if name in table}
    for name, value in match.items():
        if not isinstance(value, int if name == "m" else str):
            raise ValueError(f"case: {name}={value!r} matches nothing")
    limits = {name: table[name] for name in ("ratio", "seconds") if name in table}
    for name, value in limits.items():
        _number(name, value)
    if not limits or limits.get("ratio", 1) < 1:
        raise ValueError("case: give ratio (of times, 1 or more), seconds, or both")
    return Limits(match=match, **limits)


def _known(table: Mapping[str, Any], names: set[str]) -> None:
    if unknown := sorted(set(table) - names):
        raise ValueError(f"{unknown[0]!r} is unknown; there are {', '.join(sorted(names))}")


def _number(name: str, value: object, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r} is no {'whole ' if whole else ''}number of 0 or more")
