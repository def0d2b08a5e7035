"""Kernels that give the right output without the work that is timed, each in a way of its own.

They know how the harness goes about it: how many calls come before it times, that out is poisoned,
that x is exchanged where it lies.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.autotune import zoo
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.tensor import QuantizedTensor

# Calls before anything is timed.
CHECKED = 4


def from_codes(make_run: Callable[[QuantizedTensor], Run], n: int = 37, k: int = 22) -> Kernel:
    """A kernel that packs the codes and codebooks themselves, of tensors of zoo's format."""
    template = zoo.tensor(n, k)
    return zoo.make_kernel(
        make_run(template),
        pack=lambda tensor, config, problem: Packed(dict(tensor.parts)),
        footprint=lambda *_: Footprint(_bytes(template), 0, 1),
        reads="codes",
    )


def _bytes(tensor: QuantizedTensor) -> int:
    return sum(part.numel() * part.element_size() for part in tensor.parts.values())


def decode(template: QuantizedTensor, packed: Packed) -> torch.Tensor:
    return template.replace_parts(**packed.arrays).decode(torch.float32)


def decoding(template: QuantizedTensor) -> Run:
    """An honest one: it decodes 8 rows at a time, at every call.

    64 rows of `BIG`, with their indices, took up to 3.9 MB beside the 4 MiB that are allowed.
    """

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        tensor = template.replace_parts(**packed.arrays)
        for start in range(0, tensor.n, 8):
            rows = slice(start, min(start + 8, tensor.n))
            out[:, rows] = x @ tensor.rows(rows.start, rows.stop).decode(torch.float32).T

    return run


def biased(tensor: QuantizedTensor) -> Run:
    """An honest one of a dense weight."""

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.addmm(tensor.bias, x, packed["weight"].T, out=out)

    return run


# Outputs that were there before


def remembering(key: Callable[[Packed, torch.Tensor, torch.Tensor], Any], since: int = 0) -> Run:
    """Computes once for each `key`, from call `since` on."""
    known: dict[Any, torch.Tensor] = {}
    keep: list[Any] = []  # so that no address is used twice
    calls = itertools.count()

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        keep.append((packed, x, out))
        if next(calls) < since or key(packed, x, out) not in known:
            known[key(packed, x, out)] = x @ packed["weight"].T
        out.copy_(known[key(packed, x, out)])

    return run


def where_poisoned(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    """Works where out shows that it is being checked."""
    if bool(out.isnan().any()):
        zoo.right(packed, x, out)


def last_again() -> Run:
    """Gives the last output once more where it isn't checked."""
    last: list[torch.Tensor] = []

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        if bool(out.isnan().any()):
            zoo.right(packed, x, out)
            last[:] = [out.clone()]
        else:
            out.copy_(out.clone())

    return run


# Inputs


def spoiling(what: str, at: int) -> Run:
    """Changes an input by a bit in one call, which still comes out right."""
    calls = itertools.count(1)

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        zoo.right(packed, x, out)
        if next(calls) == at:
            array = x if what == "x" else packed["weight"]
            array[-1, -1] += 1e-6

    return run


# Work elsewhere

_DELAY_S = 2e-3


def product(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    """Right also where two threads write it: torch.mm into one `out` adds up."""
    out.copy_(x @ packed["weight"].T)


def in_thread(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    def work() -> None:
        time.sleep(_DELAY_S)
        product(packed, x, out)

    threading.Thread(target=work).start()


def in_pool() -> Run:
    pool = concurrent.futures.ThreadPoolExecutor(1)

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        def work() -> None:
            time.sleep(_DELAY_S)
            product(packed, x, out)

        pool.submit(work)

    return run


def right_and_later_again(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    """Right at once, and written once more when the harness has poisoned it."""

    def work() -> None:
        end = time.monotonic() + 2
        while not bool(out.isnan().any()) and time.monotonic() < end:
            time.sleep(1e-4)
        product(packed, x, out)

    product(packed, x, out)
    threading.Thread(target=work).start()


# Dequantised weights


def hiding(key: Callable[[Packed], Any], since: int = 0) -> Callable[[QuantizedTensor], Run]:
    """Decodes once for each `key` of a weight, from call `since` on, and keeps it."""

    def make(template: QuantizedTensor) -> Run:
        honest = decoding(template)
        kept: dict[Any, torch.Tensor] = {}
        keep: list[Packed] = []  # so that no address is used twice
        calls = itertools.count()

        def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
            if next(calls) < since:
                honest(packed, x, out)
                return
            if key(packed) not in kept:
                keep.append(packed)
                kept[key(packed)] = decode(template, packed)
            torch.mm(x, kept[key(packed)].T, out=out)

        return run

    return make


def by_address(packed: Packed) -> int:
    return packed["codes"].data_ptr()


def by_codebooks(packed: Packed) -> bytes:
    return packed["codebook_0"].view(torch.uint8).numpy().tobytes()


def by_object(packed: Packed) -> int:
    return id(packed)


def hiding_at_pack(key: Callable[[Packed], Any], n: int = 37, k: int = 22) -> Kernel:
    """Decodes when it packs; calls look it up."""
    kept: dict[Any, torch.Tensor] = {}

    def pack(tensor: QuantizedTensor, config: Any, problem: Any) -> Packed:
        packed = Packed(dict(tensor.parts))
        kept[key(packed)] = tensor.decode(torch.float32)
        return packed

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, kept[key(packed)].T, out=out)

    return dataclasses.replace(from_codes(lambda _: run, n, k), pack=pack)


# A shape whose decoded weight, 10 MB, is more than memory's slack.
BIG = (1600, 1600)

_KEPT_OUTPUT = "a result was reused"
_KEPT_WEIGHT = "keeps a copy of its weight"
_THREAD = "on a thread of its own"

Escape = tuple[Callable[[], Kernel], str]


def stopping(calls: int, words: str = "nothing was written") -> Escape:
    return (lambda: zoo.make_kernel(zoo.after(calls, zoo.lazy)), words)


# name: (its kernel, what the reason says). These show before anything is timed.
AT_ONCE: dict[str, Escape] = {
    "stops after one call": stopping(1),
    "stops after two calls": stopping(2),
    "output by x's address": (
        lambda: zoo.make_kernel(remembering(lambda packed, x, out: x.data_ptr())),
        _KEPT_OUTPUT,
    ),
    "output by what x holds": (
        lambda: zoo.make_kernel(remembering(lambda packed, x, out: x.numpy().tobytes())),
        _KEPT_WEIGHT,
    ),
    "works where out is poisoned": (lambda: zoo.make_kernel(where_poisoned), _KEPT_OUTPUT),
    "copies its output where out is not poisoned": (
        lambda: zoo.make_kernel(last_again()),
        _KEPT_OUTPUT,
    ),
    "changes x": (lambda: zoo.make_kernel(spoiling("x", 1)), "writes to its input x"),
    "changes its weight": (
        lambda: zoo.make_kernel(spoiling("weight", 2)),
        "writes to its packed weight",
    ),
    "a thread a call": (lambda: zoo.make_kernel(in_thread), _THREAD),
    "a pool of threads": (lambda: zoo.make_kernel(in_pool()), _THREAD),
    "a thread that writes again": (
        lambda: zoo.make_kernel(right_and_later_again),
        "writes to its output after the call has returned, so it works " + _THREAD,
    ),
    "weight decoded by address": (lambda: from_codes(hiding(by_address)), _KEPT_WEIGHT),
    "weight decoded by object": (lambda: from_codes(hiding(by_object)), _KEPT_WEIGHT),
    "weight decoded once": (lambda: from_codes(hiding(lambda packed: 0)), _KEPT_WEIGHT),
    "weight decoded at pack": (lambda: hiding_at_pack(lambda packed: 0), _KEPT_WEIGHT),
}

# These begin when the harness times, or after.
ONCE_TIMED: dict[str, Escape] = {
    "stops as it is timed": stopping(CHECKED),
    "stops after it was warmed up": stopping(CHECKED + 1),
    "stops after it was timed": stopping(CHECKED + 1 + 9),
    "stops at the second look": stopping(CHECKED + 1 + 9 + 2, _KEPT_OUTPUT),
    "stops at the last look": stopping(CHECKED + 1 + 9 + 4, _KEPT_OUTPUT),
    "output by out's address": (
        lambda: zoo.make_kernel(remembering(lambda packed, x, out: out.data_ptr(), CHECKED)),
        _KEPT_OUTPUT,
    ),
    "output by x's address once timed": (
        lambda: zoo.make_kernel(remembering(lambda packed, x, out: x.data_ptr(), CHECKED)),
        _KEPT_OUTPUT,
    ),
    "output by the weight's and x's address": (
        lambda: zoo.make_kernel(
            remembering(
                lambda packed, x, out: (packed["weight"].data_ptr(), x.data_ptr()), CHECKED + 1
            )
        ),
        _KEPT_OUTPUT,
    ),
    "changes x while timed": (
        lambda: zoo.make_kernel(spoiling("x", CHECKED + 5)),
        "writes to its input x while it is timed",
    ),
    "changes its weight while timed": (
        lambda: zoo.make_kernel(spoiling("weight", CHECKED + 7)),
        "writes to its packed weight while it is timed",
    ),
    "a thread a call once timed": (
        lambda: zoo.make_kernel(zoo.after(CHECKED, in_thread)),
        _THREAD,
    ),
    "weight decoded once timed": (
        lambda: from_codes(hiding(lambda packed: 0, CHECKED + 3)),
        _KEPT_WEIGHT,
    ),
    "each copy's weight decoded once timed": (
        lambda: from_codes(hiding(by_address, CHECKED)),
        _KEPT_WEIGHT,
    ),
}

# The same with a decoded weight that is large enough to be seen in memory.
BIG_ESCAPES: dict[str, Escape] = {
    "weight decoded by its codebooks": (
        lambda: from_codes(hiding(by_codebooks), *BIG),
        "bytes a call but declares 0: a hidden copy",
    ),
    "weight decoded by its codebooks at pack": (
        lambda: hiding_at_pack(by_codebooks, *BIG),
        "packing a weight leaves",
    ),
    "weight decoded by its codebooks once timed": (
        lambda: from_codes(hiding(by_codebooks, CHECKED + 3), *BIG),
        "timing its calls leaves",
    ),
}


def on_side_stream(gpu: Any, run: Run = zoo.right) -> Run:
    """Launches beside the current stream, and neither waits for it nor is waited for."""

    def launch(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        gpu.launch_beside(1e-5, functools.partial(run, packed, x, out))

    return launch
