"""The loop of a gate: pairs of fresh processes, and fresh ones again for what looks slower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.gate.decide import Conclusion, Rules, conclude, suspects
from bench.gate.job import Job, Target
from bench.gate.journal import SIDES, Journal, Round, Sample, Who
from bench.gate.process import measure
from bench.gate.sides import Side
from vqkernels.errors import BackendError

__all__ = ["Progress", "Session", "SideError"]

# What is measured, in words; how many processes are done; and how many there are.
Progress = Callable[[str, int, int], None]


class SideError(BackendError):
    """A side whose processes can't measure at all."""

    def __init__(self, who: Who, reason: str) -> None:
        super().__init__(reason)
        self.who = who


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A job's cases on two sides (or one, held against what is stored), with samples in a journal.

    harness: see `sides.write_harness`. pairs: of processes, in a round. inputs: the hash of each
    case's.
    """

    job: Job
    sides: Mapping[Who, Side]
    journal: Journal
    harness: str
    inputs: Mapping[str, str]
    pairs: int
    progress: Progress = lambda *_: None

    def run(self, rules: Rules, call: str = "gate") -> Conclusion:
        """The conclusion on all cases. call: in the journal, where it holds several."""
        cases = self.job.targets
        first = self.samples(Round(call, 0), cases)
        again = suspects(cases, first, rules)
        fresh = self.samples(Round(call, 1), again) if again else []
        return conclude(cases, first, fresh, rules)

    def samples(self, round: Round, cases: Sequence[Target]) -> list[Sample]:
        """The samples of all pairs of a round; those that the journal doesn't hold are measured."""
        for pair in range(self.pairs):
            done = self.journal.samples(round)
            if pair not in done:
                left = _alive(cases, [one for samples in done.values() for one in samples])
                self._pair(round, pair, left)
        return [one for samples in self.journal.samples(round).values() for one in samples]

    def _pair(self, round: Round, pair: int, cases: Sequence[Target]) -> None:
        """Both sides right after one another, in an order that alternates."""
        attempt = self.journal.attempts(round, pair)
        order = [who for who in SIDES if who in self.sides][:: 1 if pair % 2 == 0 else -1]
        stage = "confirmation" if round.number else round.call
        job = dataclasses.replace(self.job, targets=tuple(cases))
        for number, who in enumerate(order if cases else ()):
            done, total = len(order) * pair + number, len(order) * self.pairs
            self.progress(f"{stage}: {who}", done, total)
            try:
                process = measure(self.sides[who], job, self.harness)
            except BackendError as error:
                raise SideError(who, str(error)) from error
            self.journal.write(
                process,
                {one.name: one for one in cases},
                (round, pair, attempt),
                who,
                self.sides[who],
                self.inputs,
            )


def _alive(cases: Sequence[Target], samples: Iterable[Sample]) -> list[Target]:
    """The cases that have not failed: what has is not measured any further."""
    failed = {one.case for one in samples if one.measurement.status != "ok"}
    return [one for one in cases if one.name not in failed]
