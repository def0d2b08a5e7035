"""Param, Space and Config: a kernel's tunables, declared as data.

Nothing here enumerates or searches: that is the tuner's. A kernel says which values exist and
which combinations make no sense, by name, so that a pruned config can be counted with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from vqkernels.errors import ConfigError

__all__ = ["Config", "Constraint", "Param", "Space", "Value"]

Value = int | str | bool


class Config(Mapping[str, Value]):
    """An immutable, hashable choice of one value for each parameter."""

    def __init__(self, **values: Value) -> None:
        self._values = dict(sorted(values.items()))

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def number(self, name: str) -> int:
        """The value of an integer parameter."""
        value = self._values[name]
        assert isinstance(value, int), (name, value)
        return value

    def text(self, name: str) -> str:
        """The value of a named choice."""
        value = self._values[name]
        assert isinstance(value, str), (name, value)
        return value

    def replace(self, **values: Value) -> Config:
        """The same config with some values exchanged."""
        return Config(**{**self._values, **values})


@dataclasses.dataclass(frozen=True)
class Param:
    """One tunable: its `values`, simplest first, and what it decides."""

    name: str
    values: tuple[Value, ...]
    about: str


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A named rule that a valid config keeps."""

    name: str
    holds: Callable[[Config], bool]


@dataclasses.dataclass(frozen=True)
class Space:
    """A kernel's parameters and the rules between them."""

    params: tuple[Param, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    def broken(self, config: Config) -> str | None:
        """The name of the first rule that `config` breaks, or None."""
        return next((rule.name for rule in self.constraints if not rule.holds(config)), None)

    def check(self, config: Config) -> None:
        """Raise ConfigError unless `config` gives each parameter one of its values."""
        names = {param.name for param in self.params}
        if unknown := sorted(set(config) - names):
            raise ConfigError(f"config: no parameter {unknown[0]!r}; there are {sorted(names)}")
        for param in self.params:
            if param.name not in config:
                raise ConfigError(f"config: {param.name} is missing; use one of {param.values}")
            if config[param.name] not in param.values:
                raise ConfigError(
                    f"config: {param.name}={config[param.name]!r} is not one of {param.values}"
                )
        if rule := self.broken(config):
            raise ConfigError(f"config: {config} breaks the rule {rule!r}")
