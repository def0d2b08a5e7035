"""The one tuning loop: search, finals, confirmation.

The search shares its attempts between kernels, each with a strategy of its own: all begin, and
those whose best stays far behind get no more. The fastest few, and the default that they have to
beat, then run again in rounds of alternating order, so that drift falls on all alike. What wins is
held against the default once more, in pairs of fresh processes, under the gate's rule. Every
attempt is a row in the store before it is made, so a loop that is run again goes on where it was.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from autotune.candidates import Candidates
from autotune.measurement import Measurement
from autotune.store import Attempt, Key, Store
from autotune.strategies import DEFAULT, Outcome, Search, strategies
from autotune.verdict import Comparison, Judgement, Rule, judge
from vqkernels.space import Config

__all__ = ["Arm", "Choice", "Evaluator", "Plan", "Progress", "Result", "tune"]

# Rounds of the store: 0 the search, 1 and up the finals, from here on the confirmation.
CONFIRMATION = 100

# An arm that is this much slower than the best is given up once it has had its first attempts.
_BEHIND, _FIRST = 1.5, 8
# A config this much slower than the best is not worth more than a few samples.
_HOPELESS = 3.0
# Finalists closer than this are tied: what two runs of one config differ by on a quiet machine.
_TIE = 1.02
# How long another process that makes an attempt is waited for between two looks.
_LOOK_S = 0.2


class Evaluator(Protocol):
    """What makes attempts: processes on a device, or a recorded space."""

    def measure(
        self, kernel: str, config: Config, give_up_s: float | None = None
    ) -> tuple[Measurement, str]:
        """One attempt, and its log."""

    def fresh(self) -> None:
        """Go on in a process that has run nothing yet."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel, the hash of its source, and a config."""

    kernel: str
    source: str
    config: Config

    def key(self, round: int = 0) -> Key:
        """Its attempt in a round."""
        return Key(self.kernel, self.source, self.config, round)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A kernel that may win: its candidates, its default, and what rules a config out unmeasured.

    prune: the reason, given the best time so far (None: none yet), or None. first: configs that are
    tried before the strategy chooses, most promising first.
    """

    kernel: str
    source: str
    candidates: Candidates
    default: Config
    prune: Callable[[Config, float | None], str | None] = lambda *_: None
    first: tuple[Config, ...] = ()

    def choice(self, config: Config) -> Choice:
        """A config of this arm."""
        return Choice(self.kernel, self.source, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how: `attempts` in the search, of all kernels together, and `seconds` for it.

    finalists, rounds: of the finals; without rounds the search's times decide. pairs: of the
    confirmation; 0 leaves it out.
    """

    strategy: str = DEFAULT
    seed: int = 0
    attempts: int = 100
    seconds: float | None = None
    finalists: int = 8
    rounds: int = 4
    pairs: int = 7
    rule: Rule = dataclasses.field(default_factory=Rule)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the loop is: `done` of `total` in this stage, and the best so far."""

    stage: str
    done: int
    total: int
    last: Attempt | None
    best: Choice | None
    best_s: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What won, what it was held against, and how surely; `judgement` None where nothing was.

    seconds: of the finals, by choice. counts: attempts of the search by status. pruned: configs
    that were ruled out unmeasured, by reason.
    """

    winner: Choice
    baseline: Choice
    judgement: Judgement | None
    seconds: dict[Choice, float]
    counts: dict[str, int]
    pruned: dict[str, int]

    @property
    def faster(self) -> bool:
        """Whether the winner beat the baseline under the rule."""
        return self.judgement is not None and self.judgement.verdict == "FASTER"


def tune(
    arms: Sequence[Arm],
    baseline: Choice,
    evaluator: Evaluator,
    store: Store,
    subject: int,
    plan: Plan | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Find what beats `baseline` on a subject of the store, if anything does."""
    plan = plan or Plan()
    loop = _Loop(evaluator, store, subject, progress)
    search = _search(loop, arms, baseline, plan)
    simplest = {arm.kernel: arm.default for arm in arms}
    seconds = _finalists(search.found, baseline, plan.finalists)
    if plan.rounds:
        seconds = _finals(loop, list(seconds), plan)
    winner = _winner(seconds, baseline, simplest)
    judgement = None
    if winner != baseline and plan.pairs and baseline in seconds:
        judgement = _confirm(loop, baseline, winner, plan)
    counts = collections.Counter[str](one.measurement.status for one in search.found.values())
    return Result(winner, baseline, judgement, seconds, dict(counts), dict(search.pruned))


class _Loop:
    """Attempts through the store: found there, waited for, or made."""

    def __init__(
        self,
        evaluator: Evaluator,
        store: Store,
        subject: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.evaluator, self._store, self._subject = evaluator, store, subject
        self._progress = progress
        self.best: Choice | None = None
        self.best_s: float | None = None

    def known(self, key: Key) -> bool:
        return self._store.find(self._subject, key) is not None

    def attempt(self, choice: Choice, round: int = 0, give_up_s: float | None = None) -> Attempt:
        """The attempt of `choice` in `round`, made once whoever asks."""
        key = choice.key(round)
        while (found := self._store.find(self._subject, key)) is None:
            claim = self._store.claim(self._subject, key)
            if claim is None:  # another process is at it
                time.sleep(_LOOK_S)
                continue
            try:
                measured, log = self.evaluator.measure(choice.kernel, choice.config, give_up_s)
            except BaseException:
                self._store.give_up(claim)
                raise
            self._store.finish(claim, measured, log)
        if round == 0 and found.measurement.status == "ok":
            median = found.measurement.median_s
            if self.best_s is None or median < self.best_s:
                self.best, self.best_s = choice, median
        return found

    def report(self, stage: str, done: int, total: int, last: Attempt | None) -> None:
        self._progress(Progress(stage, done, total, last, self.best, self.best_s))


# ------------------------------------------------------------------------------------------------
# the search


class _Running:
    """An arm with its search: configs that are asked for, outcomes that go back."""

    def __init__(self, arm: Arm, plan: Plan) -> None:
        self.arm = arm
        rng = np.random.default_rng([plan.seed, zlib.crc32(arm.kernel.encode())])
        self._search: Search = strategies()[plan.strategy].search(arm.candidates, rng)
        self._batch: list[Config] = []
        self._outcomes: list[Outcome] = []
        self._begun = False
        self.attempts = 0
        self.best_s: float | None = None
        self.exhausted = False

    def next(self) -> Config | None:
        """The next config that the strategy asks for; None at its end."""
        while len(self._outcomes) == len(self._batch) and not self.exhausted:
            try:
                batch = self._search.send(self._outcomes) if self._begun else next(self._search)
            except StopIteration:
                self.exhausted = True
                return None
            self._begun, self._batch, self._outcomes = True, list(batch), []
        return None if self.exhausted else self._batch[len(self._outcomes)]

    def tell(self, config: Config, seconds: float | None, status: str) -> None:
        self._outcomes.append(Outcome(config, seconds, status))
        self.saw(seconds)

    def saw(self, seconds: float | None) -> None:
        if seconds is not None and (self.best_s is None or seconds < self.best_s):
            self.best_s = seconds


@dataclasses.dataclass
class _Search:
    """What a search found, by choice, and what it ruled out."""

    found: dict[Choice, Attempt] = dataclasses.field(default_factory=dict)
    pruned: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def _search(loop: _Loop, arms: Sequence[Arm], baseline: Choice, plan: Plan) -> _Search:
    search, running = _Search(), [_Running(arm, plan) for arm in arms]
    end = None if plan.seconds is None else time.monotonic() + plan.seconds
    defaults = [arm.choice(arm.default) for arm in arms]
    for choice in dict.fromkeys([baseline, *defaults]):
        _try(loop, search, choice, plan)
    for one in running:
        found = search.found[one.arm.choice(one.arm.default)].measurement
        one.saw(found.median_s if found.status == "ok" else None)

    def going() -> bool:
        return len(search.found) < plan.attempts and (end is None or time.monotonic() < end)

    for one, promising in _first(running):
        if going():
            _try_first(loop, search, one, promising, plan)
    while going():
        turn = _whose_turn(running, loop.best_s)
        if turn is None:
            break
        config = turn.next()
        if config is not None:
            _step(loop, search, turn, config, plan)
    return search


def _first(running: Sequence[_Running]) -> Iterator[tuple[_Running, Config]]:
    """Every arm's most promising config, then every arm's second, and so on."""
    for rank in range(max((len(one.arm.first) for one in running), default=0)):
        for one in running:
            if rank < len(one.arm.first):
                yield one, one.arm.first[rank]


def _try_first(loop: _Loop, search: _Search, one: _Running, config: Config, plan: Plan) -> None:
    """A config that no strategy asked for: when one does, its outcome is known."""
    choice = one.arm.choice(config)
    if choice in search.found or one.arm.prune(config, loop.best_s):
        return
    measured = _try(loop, search, choice, plan).measurement
    one.saw(measured.median_s if measured.status == "ok" else None)


def _whose_turn(running: Sequence[_Running], best_s: float | None) -> _Running | None:
    """The arm with the fewest attempts among those that may still win."""

    def behind(one: _Running) -> bool:
        if best_s is None or one.attempts < _FIRST:
            return False
        return one.best_s is None or one.best_s > _BEHIND * best_s

    going = [one for one in running if not one.exhausted]
    hopeful = [one for one in going if not behind(one)] or going
    return min(hopeful, key=lambda one: one.attempts, default=None)


def _step(loop: _Loop, search: _Search, one: _Running, config: Config, plan: Plan) -> None:
    """One config of an arm: pruned, or attempted; its strategy hears of it either way."""
    if reason := one.arm.prune(config, loop.best_s):
        search.pruned[reason] += 1
        one.tell(config, None, "constraint")
        return
    measured = _try(loop, search, one.arm.choice(config), plan).measurement
    one.attempts += 1
    one.tell(config, measured.median_s if measured.status == "ok" else None, measured.status)


def _try(loop: _Loop, search: _Search, choice: Choice, plan: Plan) -> Attempt:
    give_up = None if loop.best_s is None else _HOPELESS * loop.best_s
    found = loop.attempt(choice, give_up_s=give_up)
    search.found[choice] = found
    loop.report("search", len(search.found), plan.attempts, found)
    return found


# ------------------------------------------------------------------------------------------------
# finals and confirmation


def _finalists(found: dict[Choice, Attempt], baseline: Choice, count: int) -> dict[Choice, float]:
    """The fastest of the search, and the baseline where it runs at all, with their medians."""
    usable = {c: a.measurement.median_s for c, a in found.items() if a.measurement.status == "ok"}
    fastest = sorted(usable, key=lambda choice: usable[choice])[:count]
    chosen = [*fastest, *([baseline] if baseline in usable else [])]
    return {choice: usable[choice] for choice in chosen}


def _finals(loop: _Loop, finalists: list[Choice], plan: Plan) -> dict[Choice, float]:
    """Median over the rounds of each finalist's medians; one that failed in any is out."""
    medians: dict[Choice, list[float]] = {choice: [] for choice in finalists}
    done, total = 0, plan.rounds * len(finalists)
    for round in range(1, plan.rounds + 1):
        order = finalists if round % 2 else finalists[::-1]
        if not all(loop.known(choice.key(round)) for choice in order):
            loop.evaluator.fresh()
        for choice in order:
            attempt = loop.attempt(choice, round)
            if attempt.measurement.status == "ok":
                medians[choice].append(attempt.measurement.median_s)
            done += 1
            loop.report("finals", done, total, attempt)
    return {
        choice: statistics.median(values)
        for choice, values in medians.items()
        if len(values) == plan.rounds
    }


def _winner(seconds: dict[Choice, float], baseline: Choice, simplest: dict[str, Config]) -> Choice:
    """The fastest; among those tied with it the baseline, else what is nearest to a default."""
    if not seconds:
        return baseline
    best = min(seconds.values())
    tied = [choice for choice, median in seconds.items() if median <= _TIE * best]

    def changes(choice: Choice) -> int:
        default = simplest.get(choice.kernel, Config())
        return sum(default.get(name) != value for name, value in choice.config.items())

    return min(tied, key=lambda choice: (choice != baseline, changes(choice), seconds[choice]))


def _confirm(loop: _Loop, baseline: Choice, winner: Choice, plan: Plan) -> Judgement | None:
    """Baseline and winner in pairs of fresh processes, AB BA AB ...; None where either fails."""
    pairs: list[tuple[float, float]] = []
    for number in range(plan.pairs):
        order = [baseline, winner] if number % 2 == 0 else [winner, baseline]
        medians: dict[Choice, float] = {}
        for choice in order:
            round = CONFIRMATION + number
            if not loop.known(choice.key(round)):
                loop.evaluator.fresh()
            attempt = loop.attempt(choice, round)
            if attempt.measurement.status != "ok":
                return None
            medians[choice] = attempt.measurement.median_s
            loop.report("confirmation", len(pairs) + 1, plan.pairs, attempt)
        pairs.append((medians[baseline], medians[winner]))
    (judgement,) = judge([Comparison(name=winner.kernel, pairs=tuple(pairs))], plan.rule)
    return judgement
