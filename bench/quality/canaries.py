"""Canaries: short checks of what a model must go on doing, as data in a TOML file.

[[nearer]]                         # of a sentence encoder
name = "synonyms"
text = "The car would not start."
near = "The automobile failed to start."
far = "The bread is fresh."
margin = 0.3                       # cosine to `near` minus cosine to `far`, at least

[[continuation]]                   # of a causal language model
name = "weekdays"
prompt = "Monday, Tuesday, Wednesday,"
tokens = 4                         # the dense model's likeliest ones stay the likeliest
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bench.quality.sentences import read_toml
from vqkernels.errors import ConfigError

__all__ = ["OWN", "Canaries", "CanaryResult", "Continuation", "Nearer", "load_canaries"]

OWN = Path(__file__).parent / "canaries.toml"
"""The list that comes with this package."""

_MOST_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Nearer:
    """A text that lies nearer to one than to another, by a margin of the cosine."""

    name: str
    text: str
    near: str
    far: str
    margin: float


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A prompt, and how many of the dense model's greedy tokens have to stay."""

    name: str
    prompt: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Canaries:
    """A list of them, by kind."""

    nearer: tuple[Nearer, ...] = ()
    continuations: tuple[Continuation, ...] = ()


@dataclasses.dataclass(frozen=True)
class CanaryResult:
    """What a canary's figure has to be at least, and what it is, dense and quantised.

    The figure is a difference of cosines (`nearer`), or a number of tokens (`continuation`).
    """

    name: str
    kind: str
    wanted: float
    dense: float
    quantised: float

    @property
    def passed(self) -> bool:
        """Whether the quantised model does what it must."""
        return self.quantised >= self.wanted

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the figures, and whether both models pass."""
        passed = {"dense_passed": self.dense >= self.wanted, "passed": self.passed}
        return {**dataclasses.asdict(self), **passed}


def load_canaries(path: Path = OWN) -> Canaries:
    """The canaries in a TOML file. Raises ConfigError, which names file and entry."""
    table = read_toml(path, "canaries")
    try:
        if unknown := sorted(set(table) - {"nearer", "continuation"}):
            raise ValueError(f"{unknown[0]!r} is neither [[nearer]] nor [[continuation]]")
        found = Canaries(
            _all(table, "nearer", Nearer, _check_nearer),
            _all(table, "continuation", Continuation, _check_continuation),
        )
        names = [one.name for one in found.nearer] + [one.name for one in found.continuations]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two are called {twice!r}")
        if not names:
            raise ValueError("there is none in it")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"canaries {path}: {error}; see {OWN.name} of this package") from error
    return found


_Kind = TypeVar("_Kind", Nearer, Continuation)


def _all(
    table: Mapping[str, Any], key: str, kind: Callable[..., _Kind], check: Callable[[_Kind], None]
) -> tuple[_Kind, ...]:
    found = []
    for number, fields in enumerate(table.get(key, ()), 1):
        try:
            one = kind(**fields)
            check(one)
        except (TypeError, ValueError) as error:
            # of "Nearer.__init__() got an unexpected keyword argument", what comes after the name
            raise ValueError(f"{key} {number}: {str(error).rpartition('() ')[2]}") from error
        found.append(one)
    return tuple(found)


def _check_nearer(one: Nearer) -> None:
    _check_texts({"name": one.name, "text": one.text, "near": one.near, "far": one.far})
    if type(one.margin) not in (int, float) or not 0 <= one.margin <= 2:
        raise ValueError(f"margin {one.margin!r} is no number from 0 to 2")


def _check_continuation(one: Continuation) -> None:
    _check_texts({"name": one.name, "prompt": one.prompt})
    if type(one.tokens) is not int or not 0 < one.tokens <= _MOST_TOKENS:
        raise ValueError(f"tokens {one.tokens!r} is no number from 1 to {_MOST_TOKENS}")


def _check_texts(texts: Mapping[str, object]) -> None:
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} is no text")
