"""The loop of a gate: pairs of fresh processes, and fresh ones again for what looks slower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.gate.decide import Conclusion, Rules, conclude, suspects
from bench.gate.job import Job, Target
from bench.gate.journal import Journal, Round, Sample
from bench.gate.process import measure
from bench.gate.sides import SIDES, Side, Who

__all__ = ["Progress", "Session"]

# What is measured, in words; how many pairs of processes are done; and how many there are.
Progress = Callable[[str, int, int], None]


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
        """A process of each side; who comes first alternates."""
        if not cases:
            return
        attempt = self.journal.attempts(round, pair)
        stage = f"{round.call}, confirmation" if round.number else round.call
        self.progress(f"{stage}: {len(cases)} cases", pair, self.pairs)
        order = [who for who in SIDES if who in self.sides][:: 1 if pair % 2 == 0 else -1]
        job = dataclasses.replace(self.job, targets=tuple(cases))
        found = measure({who: self.sides[who] for who in order}, job, self.harness)
        for who, process in found.items():
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
