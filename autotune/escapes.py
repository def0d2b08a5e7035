"""What a kernel could do instead of its work, and how it shows before anything is timed.

Its output is looked at the moment a call returns, in the order of the stream it was asked on: work
on another thread or stream isn't done yet. Then it meets a weight that it has never seen, in
memory that is watched: what it decodes to keep is allocated there, and what it kept before gives
another output. That weight is then overwritten where it lies, which a copy by address doesn't see.
`rotation` does the like to the buffers that were timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autotune import memory
from autotune.made import EndError, Made, guarded, wait
from autotune.subject import Buffer
from autotune.timers import keep_busy
from vqkernels import oracle
from vqkernels.kernel import Packed
from vqkernels.oracle import Check, Reference

__all__ = [
    "KEPT_RESULT",
    "KEPT_WEIGHT",
    "at_once",
    "other_weight",
    "overwrite",
    "peak",
    "refuse_kept",
    "right_output",
    "same",
    "same_weight",
    "settled",
    "verdict",
]

KEPT_RESULT = "this is the output of what x held before, so a result was reused"
KEPT_WEIGHT = "this is the output of what the weight held before, so it keeps a copy of its weight"
_UNWRITTEN = "nothing was written"
_LATE = "it was right some time after the call had returned, so it works on "
_LATE_WRITE = "writes to its output after the call has returned, so it works on "

# Longer than a host takes to queue what is asked of a GPU behind it: some ten operations of 10 us.
_SPIN_S = 2e-3
# What a thread in the background gets: after a call that seemed right, and after one that didn't.
_LATER_S, _LATE_S = 1e-3, 0.05


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, so that a NaN equals itself."""
    both = [tensor.flatten().view(torch.uint8) for tensor in (one, other)]
    whole = both[0].numel() // 8 * 8  # by words: 4 MiB take 0.4 ms instead of 2.7 on one thread
    words = [tensor[:whole].view(torch.int64) for tensor in both]
    return torch.equal(*words) and torch.equal(*(tensor[whole:] for tensor in both))


def at_once(
    prepare: Callable[[], None],
    calls: Sequence[tuple[Callable[[], None], Sequence[Buffer]]],
    place: str,
) -> list[Buffer]:
    """Copies of each call's buffers, taken as soon as it returns; `prepare` comes before the first.

    On a GPU all is queued on the current stream behind a kernel that spins: what runs on another
    stream comes before `prepare`. Nothing is waited for until the end.
    """

    def run() -> list[Buffer]:
        if place != "cpu":
            keep_busy(_SPIN_S)
        prepare()
        taken = []
        for call, buffers in calls:
            call()
            taken += [buffer.copy() for buffer in buffers]
        wait(place)
        return taken

    return guarded(run, "runtime")


def verdict(
    made: Made,
    buffer: Buffer,
    expected: Reference,
    *,
    stale: Mapping[str, Reference] | None = None,
    later: Callable[[], Buffer] | None = None,
) -> Check:
    """Hold an output against `expected`, which may be of its last rows; a failure ends the attempt.

    The reason then says what was done instead, where that shows. stale: what else it may be, by
    the words for it. later: the buffer once all is done, or nearly.
    """
    if not buffer.guards_hold():
        raise EndError("incorrect", "writes outside its output")
    rows = expected.y.shape[1]
    out = buffer.out[:, -rows:]
    found = _judge(made, out, expected)
    if found.passed:
        return found
    words = _instead(made, out, expected, stale or {})
    if later is not None and _comes_later(made, guarded(later, "runtime").out[:, -rows:], expected):
        words = _LATE + _where(made.place)
    reason = f"error {found.worst:.3g} times its bound (max abs {found.max_abs:.3g})"
    raise EndError("incorrect", f"{reason}: {words}" if words else reason)


def _judge(made: Made, out: Tensor, expected: Reference) -> Check:
    """The oracle's verdict, within the bound of the kernel's own roundings."""
    kernel, problem = made.kernel, made.subject.problem
    return oracle.check(out, expected, weights=kernel.rounds_to(problem), chain=kernel.half_chain)


def _comes_later(made: Made, out: Tensor, expected: Reference) -> bool:
    """Whether an output becomes right while nothing is called; on a GPU all has been waited for."""
    end = time.monotonic() + (_LATE_S if made.place == "cpu" else 0)
    while not (passed := _judge(made, out, expected).passed) and time.monotonic() < end:
        time.sleep(_LATER_S)
    return passed


def _instead(made: Made, out: Tensor, expected: Reference, stale: Mapping[str, Reference]) -> str:
    if bool(out.isnan().all()) and bool(expected.y.isfinite().any()):
        return _UNWRITTEN
    return next((words for words, one in stale.items() if _judge(made, out, one).passed), "")


def right_output(made: Made) -> Check:
    """The worse verdict of both batches; inputs unchanged, guards whole, nothing written late."""
    subject, worst, buffers = made.subject, None, []
    before = made.packed.clone()
    for turn, (x, expected) in enumerate(zip(subject.xs, subject.references, strict=True)):
        buffer, here = made.buffer(), subject.xs[1 - turn].clone()
        lay = functools.partial(_lay, here, x, buffer)
        call = functools.partial(made.run, made.packed, here, buffer.out)
        (taken,) = at_once(lay, [(call, [buffer])], made.place)
        if not same(here, x):
            raise EndError("incorrect", "writes to its input x")
        stale = {KEPT_RESULT: subject.references[1 - turn]}
        later = functools.partial(settled, call, buffer, made.place)
        found = verdict(made, taken, expected, stale=stale, later=later)
        worst = found if worst is None or found.worst > worst.worst else worst
        buffer.poison()
        buffers.append(buffer)
    if not same_weight(before, made.packed):
        raise EndError("incorrect", "writes to its packed weight")
    if made.place == "cpu":
        time.sleep(_LATER_S)
    if not all(bool(buffer.out.isnan().all()) for buffer in buffers):
        raise EndError("incorrect", f"{_LATE_WRITE}{_where(made.place)}")
    assert worst is not None, "a subject has two batches"
    return worst


def other_weight(made: Made) -> Packed:
    """The subject's other weight as the kernel packs it; what packing keeps beside it is refused.

    Not the first pack of a process, so that nothing is loaded or compiled for it any more.
    """
    source = made.subject.other.source(made.kernel)  # made and kept by the first who asks
    packed, kept = memory.kept_by(lambda: made.pack(source), made.place)
    refuse_kept(kept, packed.nbytes, "packing a weight")
    return packed


def refuse_kept(kept: int | None, allowed: int, what: str) -> None:
    """End the attempt where `what` left more bytes in use than it may."""
    if kept is not None and kept > allowed + memory.SLACK:
        raise EndError(
            "incorrect",
            f"{what} leaves {kept - allowed:,} bytes in use that it doesn't declare: a hidden copy",
        )


def peak(made: Made, other: Packed) -> tuple[int | None, float]:
    """Bytes allocated beside weight, x and out by a call, held against the footprint; its time.

    By a call on `other`, which the kernel has never seen: what it keeps of a weight from one call
    to the next is made now. Its own weight then comes to lie where `other` was.
    """
    subject = made.subject
    weight, buffer, x = other.clone(), made.buffer(), subject.xs[0].clone()
    seconds = 0.0

    def call() -> None:
        nonlocal seconds
        start = time.perf_counter()
        made.call(x, buffer.out, weight)
        seconds = time.perf_counter() - start

    allocated = memory.peak_during(call, made.place)
    start, others = subject.other.start, subject.other.references
    own = [one.rows(start, subject.problem.n) for one in subject.references]
    verdict(made, buffer, others[0], stale={KEPT_WEIGHT: own[0]})
    declared = made.declared.workspace_bytes
    if allocated is not None and allocated > declared + memory.SLACK:
        raise EndError(
            "incorrect",
            f"allocates {allocated:,} bytes a call but declares {declared:,}: a hidden copy",
        )
    if overwrite(weight, made.packed):
        x.copy_(subject.xs[1])
        made.call(x, buffer.out, weight)
        verdict(made, buffer, own[1], stale={KEPT_WEIGHT: others[1], KEPT_RESULT: others[0]})
    return allocated, seconds


def overwrite(weight: Packed, by: Packed) -> bool:
    """Lay another weight where one lies; False, and nothing done, where its arrays don't fit."""
    pairs = [(array, by.arrays.get(name)) for name, array in weight.arrays.items()]
    if any(o is None or (o.shape, o.dtype) != (array.shape, array.dtype) for array, o in pairs):
        return False  # a layout whose size depends on the codes themselves
    for array, new in pairs:
        assert new is not None
        array.copy_(new)
    return True


def settled(call: Callable[[], None], buffer: Buffer, place: str) -> Buffer:
    """A call's buffer as it will be: on a GPU of one more with nothing queued before it.

    A thread of a CPU is still to write what it was asked for.
    """
    if place != "cpu":
        wait(place)
        call()
        wait(place)
    return buffer


def same_weight(one: Packed, other: Packed) -> bool:
    """Whether all arrays are equal bit for bit."""
    return all(same(array, other.arrays[name]) for name, array in one.arrays.items())


def _lay(here: Tensor, x: Tensor, buffer: Buffer) -> None:
    here.copy_(x)
    buffer.poison()


def _where(place: str) -> str:
    return "a thread of its own" if place == "cpu" else "a stream of its own"
