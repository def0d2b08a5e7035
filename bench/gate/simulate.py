"""How often the gate is wrong: its own code on measurements whose truth is known.

A trial is a call: for each case processes in the order AB BA AB ..., each with samples of its own,
whose medians go through `autotune.verdict` as a real call's do; suspects get fresh pairs. Noise is
of three sorts: between the samples of a process, between processes (`between`, and for a shared
machine a share of processes that are `slow_by` slower), and a drift over each session, which in
each trial is a line, a step somewhere or a sine of one period, up or down.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.verdict import Comparison, Judgement, Rule, settle, suspects
from bench.gate.shares import shares

__all__ = ["EFFECTS", "SPREADS", "Setting", "Tally", "rows", "simulate"]

# What `vqbench selfcheck --simulate` goes through.
SPREADS = (0.003, 0.01, 0.02)
EFFECTS = (0.0, 0.03, 0.05, 0.08)

# Trials that are drawn at once: 2 x 14 processes x 100 samples of 8 bytes are 22 KB a case.
_AT_ONCE = 500

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated. Spreads are standard deviations of a time's log.

    effect: by how much the first `slowed` of a call's cases are slower: 0.05 is 1.05 times. drift:
    from a session's least to its most. slow_share: chance that a process is `slow_by` slower.
    time_s: what A takes. noise: the stored floor of every case, see Comparison.
    """

    effect: float = 0.0
    between: float = 0.01
    within: float = 0.01
    drift: float = 0.03
    slow_share: float = 0.0
    slow_by: float = 0.05
    cases: int = 1
    slowed: int = 1
    pairs: int = 7
    samples: int = 100
    time_s: float = 1e-4
    noise: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """What came of a setting's trials: verdicts on slowed cases and on those that weren't.

    repeated: trials in which some case was measured again.
    """

    setting: Setting
    trials: int
    slowed: dict[str, int]
    others: dict[str, int]
    repeated: int

    @property
    def shares(self) -> dict[str, float]:
        """Of the slowed cases; see `bench.gate.shares`."""
        return shares(self.slowed)


def simulate(setting: Setting, trials: int, seed: int = 0, rule: Rule | None = None) -> Tally:
    """Judge `trials` calls; the same seed gives the same counts."""
    rule, rng = rule or Rule(), np.random.default_rng(seed)
    slowed: Counter[str] = Counter()
    others: Counter[str] = Counter()
    repeated = 0
    for start in range(0, trials, _AT_ONCE):
        for first, fresh in _calls(setting, min(_AT_ONCE, trials - start), rng):
            judged, again = _judged(first, fresh, rule)
            repeated += again
            slowed.update(one.verdict for one in judged[: setting.slowed])
            others.update(one.verdict for one in judged[setting.slowed :])
    return Tally(
        setting=setting,
        trials=trials,
        slowed=dict(slowed),
        others=dict(others),
        repeated=repeated,
    )


def rows(
    trials: int, seed: int = 0, progress: Callable[[Setting], None] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each spread and effect, JSON-ready. progress: told of each setting before it."""
    for between in SPREADS:
        for effect in EFFECTS:
            setting = Setting(between=between, effect=effect)
            if progress:
                progress(setting)
            tally = simulate(setting, trials, seed)
            yield {
                "between": between,
                "effect": effect,
                "trials": trials,
                **tally.shares,
                "repeated": tally.repeated / trials,
            }


def _judged(
    first: list[Comparison], fresh: list[Comparison], rule: Rule
) -> tuple[list[Judgement], bool]:
    """As the gate does it, and whether it had to measure again."""
    suspected = {one.name for one in suspects(first, rule)}
    again = [one for one in fresh if one.name in suspected]
    return settle(first, again, rule), bool(again)


def _calls(
    setting: Setting, count: int, rng: np.random.Generator
) -> Iterator[tuple[list[Comparison], list[Comparison]]]:
    """For each trial the comparisons of two sessions."""
    first, fresh = (_session(setting, count, rng) for _ in range(2))
    for call in range(count):
        yield _comparisons(setting, first[call]), _comparisons(setting, fresh[call])


def _comparisons(setting: Setting, times: Array) -> list[Comparison]:
    """times: `[cases, pairs, (A, B)]`."""
    return [
        Comparison(name=str(case), pairs=tuple(map(tuple, pairs)), noise=setting.noise)
        for case, pairs in enumerate(times.tolist())
    ]


def _session(setting: Setting, count: int, rng: np.random.Generator) -> Array:
    """Medians of processes, `[count, cases, pairs, (A, B)]` in seconds."""
    shape = (count, setting.cases, 2 * setting.pairs)
    logs = rng.normal(0, setting.between, shape)
    logs += np.log1p(setting.slow_by) * (rng.random(shape) < setting.slow_share)
    # a machine's drift is the same for all cases of a process
    logs += _drift(setting.drift, count, 2 * setting.pairs, rng)[:, None, :]
    samples = rng.normal(0, setting.within, (*shape, setting.samples))
    logs += np.median(samples, axis=-1)
    pairs = logs.reshape(count, setting.cases, setting.pairs, 2)
    pairs[:, :, 1::2] = pairs[:, :, 1::2, ::-1].copy()  # every second pair ran B first
    pairs[:, : setting.slowed, :, 1] += np.log1p(setting.effect)
    return setting.time_s * np.exp(pairs)


def _drift(most: float, count: int, processes: int, rng: np.random.Generator) -> Array:
    """Logs over a session, `[count, processes]`: lines, steps and sines by chance."""
    at = np.linspace(0, 1, processes)
    start = rng.random((count, 1))
    shapes = np.stack(
        [
            np.broadcast_to(at, (count, processes)),
            (at > start).astype(np.float64),
            np.sin(2 * np.pi * (at + start)) / 2,
        ]
    )
    which = rng.integers(0, 3, count)
    signs: Array = rng.choice([-1.0, 1.0], (count, 1))
    drift: Array = most * signs * shapes[which, np.arange(count)]
    return drift
