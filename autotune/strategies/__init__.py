"""Search strategies: one file each, found by scanning; a module ends in `STRATEGY`.

A strategy is a generator. It yields a batch of candidates and is sent their outcomes, so it can't
touch a device, and runs on recorded spaces as it does on real ones. It never yields a config
twice nor one that is no candidate, and ends when it has asked for all; the budget is the caller's.
Files whose name starts with an underscore hold what several of them are made of.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Generator, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from autotune.candidates import Candidates
from vqkernels.space import Config

__all__ = ["DEFAULT", "Outcome", "Search", "Start", "Strategy", "strategies"]

DEFAULT = "auto"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a config: its time, or None and the status that says why there is none."""

    config: Config
    seconds: float | None
    status: str = "ok"


Search = Generator[list[Config], list[Outcome], None]


class Start(Protocol):
    """Starts a search; the same `rng` gives the same one.

    batch: how many configs are yielded at once at most; a caller that compiles several at a time
    asks for more than one, and the strategy then knows less when it chooses.
    """

    def __call__(
        self, candidates: Candidates, rng: np.random.Generator, *, batch: int = 1
    ) -> Search:
        """A generator that hasn't started yet."""
        ...


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way to search, by name."""

    name: str
    search: Start
    about: str


@functools.cache
def strategies() -> Mapping[str, Strategy]:
    """Every strategy by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").STRATEGY for name in names]
    return MappingProxyType({strategy.name: strategy for strategy in found})
