"""What is timed: calls that go round copies of the weights, and what holds them to it afterwards.

x and out stay where they are and what they hold changes, so that nothing but the work gives the
output: x is exchanged with out poisoned, then negated with the old output left in out (a poisoned
one tells a kernel that it is being checked), then the copies get another weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from autotune import escapes, memory
from autotune.made import EndError, Made, guarded
from autotune.subject import Buffer
from autotune.timers import Samples, pinned_threads
from vqkernels.kernel import Packed, Run
from vqkernels.oracle import Reference

__all__ = ["Rotation"]

# The output of a step in a batch.
_Expected = Callable[[Made, int], Reference]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The steps of a call on `copies` of their weights, in turn with both batches of tokens.

    copies: by copy and step. xs, buffers: by batch and step.
    """

    made: Sequence[Made]
    copies: Sequence[Sequence[Packed]]
    xs: Sequence[Sequence[Tensor]]
    buffers: Sequence[Sequence[Buffer]]

    @classmethod
    def make(cls, made: Sequence[Made], count: int) -> Rotation:
        """Memory of its own, all of it touched."""
        copies = [[one.packed.clone() for one in made] for _ in range(count)]
        xs = [[one.subject.xs[batch].clone() for one in made] for batch in (0, 1)]
        return cls(made, copies, xs, [[one.buffer() for one in made] for _ in xs])

    def calls(self) -> list[Callable[[], None]]:
        """Every copy meets both batches, and no copy comes twice in a row."""
        count = len(self.copies)
        turns = range(count * (1 + count % 2))
        return [functools.partial(_run, self._works(turn)) for turn in turns]

    def sample(self, take: Callable[[list[Callable[[], None]]], Samples]) -> Samples:
        """What `take` gives; the attempt ends where inputs changed, outputs are wrong, or memory
        stayed in use.
        """
        calls = self.calls()
        with pinned_threads():
            pass  # loads and compiles what a CPU's timer takes: 70 MB that no kernel keeps
        samples, kept = memory.kept_by(lambda: guarded(lambda: take(calls), "runtime"), self._place)
        for at, one in enumerate(self.made):
            if not all(escapes.same(self.xs[b][at], one.subject.xs[b]) for b in (0, 1)):
                raise EndError("incorrect", "writes to its input x while it is timed")
            if not all(escapes.same_weight(row[at], one.packed) for row in self.copies):
                raise EndError("incorrect", "writes to its packed weight while it is timed")
        self._judge(samples.replay, self._lives(), _own, {})
        workspace = sum(one.declared.workspace_bytes for one in self.made)
        escapes.refuse_kept(kept, workspace, "timing its calls")
        return samples

    def hold(self, replay: Callable[[], None] | None, others: Sequence[Packed]) -> None:
        """End the attempt where other contents don't give the outputs that belong to them.

        replay: of the graph that was timed; the first two calls where there is none. others: for
        each step, its subject's other weight.
        """
        self._again(replay, self._exchange, _exchanged, {escapes.KEPT_RESULT: _own})
        self._again(replay, self._negate, _negated, {escapes.KEPT_RESULT: _exchanged})
        copies = self.copies if replay else self.copies[:2]
        fits = [
            escapes.overwrite(weight, by)
            for row in copies
            for weight, by in zip(row, others, strict=True)
        ]
        if all(fits):
            stale = {
                escapes.KEPT_WEIGHT: _tail(_exchanged),
                escapes.KEPT_RESULT: _tail(_negated),
            }
            self._again(replay, self._negate, _others, stale)

    @property
    def _place(self) -> str:
        return self.made[0].place

    def _works(self, turn: int) -> list[tuple[Run, Packed, Tensor, Tensor]]:
        rows = (self.copies[turn % len(self.copies)], self.xs[turn % 2], self.buffers[turn % 2])
        return [
            (one.run, weight, x, buffer.out)
            for one, weight, x, buffer in zip(self.made, *rows, strict=True)
        ]

    def _exchange(self) -> None:
        for x, other in zip(*self.xs, strict=True):
            kept = x.clone()
            x.copy_(other)
            other.copy_(kept)
        for buffer in self._lives():
            buffer.poison()

    def _negate(self) -> None:
        for row in self.xs:
            for x in row:
                x.neg_()

    def _again(
        self,
        replay: Callable[[], None] | None,
        prepare: Callable[[], None],
        expected: _Expected,
        stale: Mapping[str, _Expected],
    ) -> None:
        """Run what was timed once more behind `prepare`."""
        lives = self._lives()
        if replay:
            pairs = [(replay, lives)]
        else:
            pairs = [(call, [live]) for call, live in zip(self._steps(), lives, strict=True)]
        taken = escapes.at_once(prepare, pairs, self._place)
        self._judge(replay, taken, expected, stale)

    def _judge(
        self,
        replay: Callable[[], None] | None,
        taken: Sequence[Buffer],
        expected: _Expected,
        stale: Mapping[str, _Expected],
    ) -> None:
        """Hold the outputs of both batches against what is expected; `taken` in `_lives`' order."""
        steps = [replay] * len(taken) if replay else self._steps()
        where = [(one, batch) for batch in (0, 1) for one in self.made]
        for call, live, then, (one, batch) in zip(steps, self._lives(), taken, where, strict=True):
            escapes.verdict(
                one,
                then,
                expected(one, batch),
                stale={words: of(one, batch) for words, of in stale.items()},
                later=functools.partial(escapes.settled, call, live, self._place),
            )

    def _lives(self) -> list[Buffer]:
        return [buffer for row in self.buffers for buffer in row]

    def _steps(self) -> list[Callable[[], None]]:
        """The first two calls, step by step."""
        works = [work for turn in (0, 1) for work in self._works(turn)]
        return [functools.partial(run, weight, x, out) for run, weight, x, out in works]


def _run(works: Sequence[tuple[Run, Packed, Tensor, Tensor]]) -> None:
    for run, weight, x, out in works:
        run(weight, x, out)


def _own(one: Made, batch: int) -> Reference:
    return one.subject.references[batch]


def _exchanged(one: Made, batch: int) -> Reference:
    return one.subject.references[1 - batch]


def _negated(one: Made, batch: int) -> Reference:
    """Exact: the product is linear in x, apart from the bias."""
    found, bias = _exchanged(one, batch), one.subject.placed.bias
    y = -found.y if bias is None else 2 * bias.double() - found.y
    return dataclasses.replace(found, y=y)


def _others(one: Made, batch: int) -> Reference:
    return one.subject.other.references[1 - batch]


def _tail(of: _Expected) -> _Expected:
    """Of the rows that the other weight's references have."""

    def cut(one: Made, batch: int) -> Reference:
        return of(one, batch).rows(one.subject.other.start, one.subject.problem.n)

    return cut
