"""Kernels to hold the measuring layer against: a right one, and every way of making it wrong."""

from __future__ import annotations

import functools
from typing import Any

import torch

from autotune.timers import Budget
from vqkernels.device import Device
from vqkernels.kernel import Footprint, Kernel, Packed, Run
from vqkernels.space import Config, Param, Space
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import random_tensor

# Caches and memory so small that a few copies of a weight are "cold".
DEVICE = Device(
    kind="cpu", name="Test", arch="none", units=1, llc_bytes=1 << 16, memory_bytes=1 << 30
)
# Counted, not timed: how many calls a kernel sees must not depend on the machine's load.
BUDGET = Budget(seconds=0, warmup_s=0, min_samples=9, max_samples=9)
SPEC = CodebookSpec(vector_length=4, stages=(16, 16))


def tensor(n=37, k=22, **options):
    """Ragged on purpose: k is no multiple of the vector, n of nothing."""
    return random_tensor(SPEC, n, k, **options)


def right(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, packed["weight"].T, out=out)


def make_kernel(run: Run = right, **fields: Any) -> Kernel:
    """A dense kernel around `run`; `fields` replace what Kernel asks for."""
    space = Space((Param("tile", (8, 16), "rows at a time"),))
    return Kernel(
        **{
            "name": "fake",
            "op": "linear",
            "backend": "test",
            "space": space,
            "supports": lambda problem, device: None,
            "default": lambda problem, device: Config(tile=8),
            "footprint": lambda config, problem, device: Footprint(
                4 * problem.n * problem.k, 0, problem.flops
            ),
            "pack": lambda tensor, config, problem: Packed(
                {"weight": tensor.decode(torch.float32)}
            ),
            "compile": lambda config, problem, device: run,
            "about": "for tests",
            "reads": "dense",
            **fields,
        }
    )


def raising(*_: Any) -> Any:
    raise ZeroDivisionError("first line\nsecond line")


def after(calls: int, then: Run) -> Run:
    """Right for so many calls, `then` for the rest."""
    done = 0

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal done
        done += 1
        (right if done <= calls else then)(packed, x, out)

    return run


def remembering() -> Run:
    """Computes once for each address of x, then copies what it computed."""
    known: dict[int, torch.Tensor] = {}
    keep = []  # so that no address is used twice

    def run(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
        keep.append(x)
        if x.data_ptr() not in known:
            known[x.data_ptr()] = x @ packed["weight"].T
        out.copy_(known[x.data_ptr()])

    return run


def zeros(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    out.zero_()


def lazy(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes nothing."""


def tailless(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    whole = x.shape[1] // 4 * 4
    torch.mm(x[:, :whole], packed["weight"][:, :whole].T, out=out)


def rowless(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    right(packed, x, out)
    out[:, -1] = 0


def _beside(out: torch.Tensor, offset: int) -> torch.Tensor:
    return out.as_strided((1,), (1,), out.storage_offset() + offset)


def writing_before(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    right(packed, x, out)
    _beside(out, -1).zero_()


def writing_behind(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    right(packed, x, out)
    _beside(out, out.numel()).zero_()


def spoiling_x(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    right(packed, x, out)
    x.zero_()


def spoiling_weight(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    right(packed, x, out)
    packed["weight"][0, 0] += 1e-7


def greedy(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    """Allocates 64 MiB, as much as no allocator keeps, and touches it."""
    torch.ones(16 << 20)
    right(packed, x, out)


def hiding_nan(packed: Packed, x: torch.Tensor, out: torch.Tensor) -> None:
    right(packed, x.nan_to_num(), out)


def swapped(tensor, config: Config, problem) -> Packed:
    book = tensor.parts["codebook_0"].roll(1, dims=2)
    return Packed({"weight": tensor.replace_parts(codebook_0=book).decode(torch.float32)})


def fat(tensor, config: Config, problem) -> Packed:
    weight = tensor.decode(torch.float32)
    return Packed({"weight": weight, "spare": torch.zeros(1)})


def shared(tensor, config: Config, problem) -> Packed:
    """Packs views of the tensor's own parts."""
    return Packed(dict(tensor.parts))


# name: (kernel, status, what the reason says)
ZOO: dict[str, tuple[functools.partial[Kernel], str, str]] = {
    "zeros": (functools.partial(make_kernel, zeros), "incorrect", "times its bound"),
    "unwritten": (functools.partial(make_kernel, lazy), "incorrect", "times its bound"),
    "dropped tail": (functools.partial(make_kernel, tailless), "incorrect", "times its bound"),
    "dropped row": (functools.partial(make_kernel, rowless), "incorrect", "times its bound"),
    "wrong codebook": (functools.partial(make_kernel, pack=swapped), "incorrect", "its bound"),
    "before out": (functools.partial(make_kernel, writing_before), "incorrect", "outside"),
    "behind out": (functools.partial(make_kernel, writing_behind), "incorrect", "outside"),
    "spoils x": (functools.partial(make_kernel, spoiling_x), "incorrect", "its input x"),
    "spoils weight": (functools.partial(make_kernel, spoiling_weight), "incorrect", "packed"),
    "packs more": (functools.partial(make_kernel, pack=fat), "incorrect", "but declares 3,256"),
    "raises in supports": (functools.partial(make_kernel, supports=raising), "compile", "Zero"),
    "raises in default": (functools.partial(make_kernel, default=raising), "compile", "Zero"),
    "raises in footprint": (functools.partial(make_kernel, footprint=raising), "compile", "Zero"),
    "raises in pack": (functools.partial(make_kernel, pack=raising), "compile", "first line"),
    "raises in compile": (functools.partial(make_kernel, compile=raising), "compile", "first line"),
    "raises in run": (functools.partial(make_kernel, raising), "runtime", "first line"),
    "unsupported": (
        functools.partial(make_kernel, supports=lambda *_: "a limit of 4 entries"),
        "constraint",
        "a limit of 4 entries",
    ),
    "default outside its space": (
        functools.partial(make_kernel, default=lambda *_: Config(tile=9)),
        "constraint",
        "tile=9 is not one of",
    ),
}
