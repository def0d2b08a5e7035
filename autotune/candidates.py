"""Candidates: the valid configs of a space, numbered, and why the other combinations are not here.

A rule is an opaque function of a config, but not a silent one: a probe notes which parameters it
reads. A rule that read only `a` and `b` says the same of every config with these two values, so it
runs once for each pair, not for each config, and rules out a branch before the rest of it exists.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqkernels.errors import ConfigError
from vqkernels.space import Config, Constraint, Param, Space, Value

__all__ = ["Candidates", "Indices", "enumerate_space", "from_configs"]

Indices = NDArray[np.int64]
_Rows = NDArray[np.int16]

# A space that holds more is thinned out to about this many, evenly.
LIMIT = 1 << 20
# Numbers of combinations are int64.
_MOST = 1 << 62


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates(Sequence[Config]):
    """Valid configs in the order of their parameters' values; `candidates[i]` builds one.

    rows: which value each parameter has, by position, `[candidates, params]`. ruled_out: how many
    combinations each rule took away, by name; a combination counts for the rule that was decided
    first. complete: False where the space was too large and this is an even sample of it.
    """

    params: tuple[Param, ...]
    rows: _Rows
    ruled_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    complete: bool = True
    _strides: Indices = dataclasses.field(init=False, repr=False)
    _numbers: Indices = dataclasses.field(init=False, repr=False)
    _places: tuple[dict[Value, int], ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        strides = _strides(self.params)
        numbers = self.rows.astype(np.int64) @ strides
        assert (np.diff(numbers) > 0).all(), "rows are sorted and none is there twice"
        places = tuple({v: at for at, v in enumerate(p.values)} for p in self.params)
        object.__setattr__(self, "_strides", strides)
        object.__setattr__(self, "_numbers", numbers)
        object.__setattr__(self, "_places", places)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row = self.rows[index].tolist()
        return Config(**{p.name: p.values[at] for p, at in zip(self.params, row, strict=True)})

    def __iter__(self) -> Iterator[Config]:
        return (self[at] for at in range(len(self)))

    def __contains__(self, config: object) -> bool:
        return isinstance(config, Config) and self._find(config) is not None

    def index(self, config: Config, *_: Any) -> int:
        """The number of `config`. Raises ConfigError where it is none of these."""
        found = self._find(config)
        if found is None:
            raise ConfigError(f"{config} is not a candidate; ask for one that is in the space")
        return found

    def _find(self, config: Config) -> int | None:
        if len(config) != len(self.params):
            return None
        row = []
        for param, places in zip(self.params, self._places, strict=True):
            if param.name not in config or config[param.name] not in places:
                return None
            row.append(places[config[param.name]])
        return self.at_row(row)

    def at_row(self, row: Sequence[int] | _Rows) -> int | None:
        """The number of the candidate with values at these places; None where there is none."""
        number = int(np.asarray(row, np.int64) @ self._strides)
        at = int(np.searchsorted(self._numbers, number))
        return at if at < len(self) and self._numbers[at] == number else None

    @property
    def combinations(self) -> int:
        """All combinations of values, valid or not."""
        return math.prod(len(param.values) for param in self.params)

    def sample(self, rng: np.random.Generator, count: int) -> Indices:
        """`count` different candidates (all, where there are fewer), in random order."""
        return rng.choice(len(self), size=min(count, len(self)), replace=False)

    def neighbours(self, index: int, *, adjacent: bool = False) -> Indices:
        """The candidates that differ from this one in a single parameter, in order.

        adjacent: only those a step away, to the next value in either direction.
        """
        row, found = self.rows[index].astype(np.int64), []
        for at, (param, stride) in enumerate(zip(self.params, self._strides, strict=True)):
            values = np.arange(len(param.values))
            if adjacent:
                values = values[np.abs(values - row[at]) == 1]
            found.append(self._numbers[index] + (values - row[at]) * stride)
        numbers = np.concatenate([*found, np.empty(0, np.int64)])
        at_ = np.searchsorted(self._numbers, numbers).clip(max=len(self) - 1)
        return np.unique(at_[(self._numbers[at_] == numbers) & (at_ != index)])

    def without(self, name: str, keeps: Callable[[Config], bool]) -> Candidates:
        """Only the candidates that `keeps` accepts; those it rejects are counted under `name`."""
        kept, _ = _Rule(Constraint(name, keeps), self.params).holds(self.rows, len(self.params))
        lost = int((~kept).sum())
        counts = {**self.ruled_out, name: self.ruled_out.get(name, 0) + lost}
        return Candidates(self.params, self.rows[kept], counts, self.complete)


def enumerate_space(space: Space, *, limit: int = LIMIT) -> Candidates:
    """The valid configs of `space`; an even sample of about `limit` where there are more.

    Raises ConfigError where a rule fails on a combination that no rule before it takes away.
    """
    _strides(space.params)  # raises where there are too many to number, before any is looked at
    rules = [_Rule(rule, space.params) for rule in space.constraints]
    ruled_out = {rule.name: 0 for rule in space.constraints}
    sizes = [len(param.values) for param in space.params]
    # The same sample on every run: numbers of candidates are what strategies and seeds speak of.
    rng = np.random.default_rng(0)
    rows, complete = np.zeros((1, len(sizes)), np.int16), True
    for known in range(len(sizes) + 1):
        if known:
            rows = _extend(rows, known - 1, sizes[known - 1])
        branch = math.prod(sizes[known:])
        for rule in rules:
            kept, decided = rule.holds(rows, known)
            ruled_out[rule.name] += int((~kept).sum()) * branch
            rows = rows[kept]
            if known == len(sizes):
                assert decided
        if len(rows) > limit:
            # Whole branches go, each as likely as any other: every valid config stays with the
            # same chance.
            rows, complete = rows[np.sort(rng.choice(len(rows), limit, replace=False))], False
    return Candidates(space.params, rows, ruled_out, complete)


def from_configs(params: Sequence[Param], configs: Iterable[Mapping[str, Value]]) -> Candidates:
    """Exactly these configs, whatever rule chose them. Raises ConfigError where one doesn't fit."""
    params = tuple(params)
    places = [{value: at for at, value in enumerate(param.values)} for param in params]
    try:
        rows = [
            [place[config[param.name]] for param, place in zip(params, places, strict=True)]
            for config in configs
        ]
    except KeyError as error:
        raise ConfigError(
            f"config: {error.args[0]!r} is no parameter or value of the space; "
            f"there are {', '.join(param.name for param in params)}"
        ) from error
    table = np.array(rows, np.int16).reshape(-1, len(params))
    _, first = np.unique(table.astype(np.int64) @ _strides(params), return_index=True)
    return Candidates(params, table[first])


def _strides(params: Sequence[Param]) -> Indices:
    sizes = [len(param.values) for param in params]
    if math.prod(sizes) > _MOST:
        raise ConfigError(
            f"space: {math.prod(sizes):.1e} combinations are more than can be numbered; "
            f"declare fewer values"
        )
    return np.array([math.prod(sizes[at + 1 :]) for at in range(len(sizes))], np.int64)


def _extend(rows: _Rows, at: int, size: int) -> _Rows:
    """Each row once with each value of parameter `at`."""
    longer = np.repeat(rows, size, axis=0)
    longer[:, at] = np.tile(np.arange(size), len(rows))
    return longer


class _Reads(dict[str, Value]):
    """A config's values, and the names of those that were looked at."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Value:
        self.seen.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        self.seen.update(super().__iter__())
        return super().__iter__()

    def keys(self) -> Any:
        self.seen.update(super().__iter__())
        return super().keys()

    def items(self) -> Any:
        self.seen.update(super().__iter__())
        return super().items()


class _Probe(Config):
    """A config that notes which of its values are read; Config reads through `_values` only."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = self.reads = _Reads(values)


class _Rule:
    """A rule, the parameters it has been seen to read, and what it said of their values."""

    def __init__(self, rule: Constraint, params: Sequence[Param]) -> None:
        self.name, self._holds, self._params = rule.name, rule.holds, params
        self._place = {param.name: at for at, param in enumerate(params)}
        self._reads: list[int] = []

    def holds(self, rows: _Rows, known: int) -> tuple[NDArray[np.bool_], bool]:
        """Which rows the rule lets through, and whether it could tell for all of them.

        known: how many parameters are chosen; a row on which the rule reads another stays.
        """
        if not len(rows):
            return np.ones(0, np.bool_), True
        while True:
            table = rows[:, self._reads].astype(np.int64)
            sizes = [len(self._params[at].values) for at in self._reads]
            keys = table @ np.array([math.prod(sizes[at + 1 :]) for at in range(len(sizes))], int)
            _, first, group = np.unique(keys, return_index=True, return_inverse=True)
            verdicts = self._verdicts(rows[first], known)
            if verdicts is not None:
                return np.array([v is not False for v in verdicts])[group], None not in verdicts

    def _verdicts(self, rows: _Rows, known: int) -> list[bool | None] | None:
        """One verdict a row, None where it reads what isn't chosen.

        None as a whole where the rule reads a parameter that the rows were not told apart by.
        """
        verdicts: list[bool | None] = []
        for row in rows.tolist():
            probe = _Probe({p.name: p.values[at] for p, at in zip(self._params, row, strict=True)})
            try:
                verdict: bool | None = bool(self._holds(probe))
            except Exception as error:
                # It may lean on another rule that hasn't been decided yet.
                if known == len(self._params):
                    raise ConfigError(
                        f"rule {self.name!r} fails on {Config(**dict(probe))}: {error}; "
                        f"make it say False"
                    ) from error
                verdict = None
            reads = {self._place[name] for name in probe.reads.seen if name in self._place}
            if any(at >= known for at in reads):
                verdict = None
            elif not reads.issubset(self._reads):
                self._reads += sorted(reads - set(self._reads))
                return None
            verdicts.append(verdict)
        return verdicts
