"""What a kernel is given and held to: a weight, tokens and references, and a guarded output."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vqkernels import oracle
from vqkernels.atomic import write_atomically
from vqkernels.device import Device
from vqkernels.kernel import Kernel
from vqkernels.oracle import Reference
from vqkernels.problem import Problem
from vqkernels.tensor import QuantizedTensor

__all__ = ["Buffer", "Other", "Subject", "make_subject"]

# Out stands between guards of this many elements: a store past its end shows.
_GUARD = 256
_SENTINEL = 12345.0


@dataclasses.dataclass(frozen=True)
class Other:
    """Another weight of a subject's format and shape, and what it makes of the same tokens.

    tensor, placed: as a subject's. references: of output rows from `start` on, for both batches.
    """

    tensor: QuantizedTensor
    placed: QuantizedTensor
    start: int
    references: tuple[Reference, Reference]

    def source(self, kernel: Kernel) -> QuantizedTensor:
        """The weight as `kernel` packs it."""
        return self.placed if kernel.packs_anywhere else self.tensor


@dataclasses.dataclass(frozen=True)
class Subject:
    """A weight and two batches of tokens with their references: what every kernel is held to.

    Two, so that consecutive timed calls never see the same x. `tensor` is on the CPU, all else on
    `place` (as torch names it), where outputs are compared too.
    """

    tensor: QuantizedTensor
    problem: Problem
    device: Device
    xs: tuple[Tensor, Tensor]
    references: tuple[Reference, Reference]
    controls: dict[str, bool]
    place: str
    placed: QuantizedTensor

    def source(self, kernel: Kernel) -> QuantizedTensor:
        """The weight as `kernel` packs it: from `place` if it can, which saves minutes there."""
        return self.placed if kernel.packs_anywhere else self.tensor

    @functools.cached_property
    def other(self) -> Other:
        """Codes a row further and entries one further: a weight that no kernel can have kept.

        The oracle sees its last rows only: all of them take it seconds.
        """
        m, start = self.problem.m, oracle.tail(self.tensor)
        tensor = _turned(self.tensor)
        placed = tensor if self.placed is self.tensor else _turned(self.placed)
        expected = oracle.reference(placed.rows(start, placed.n), torch.cat(self.xs))
        both = (expected.tokens(0, m), expected.tokens(m, 2 * m))
        return Other(tensor=tensor, placed=placed, start=start, references=both)


def _turned(tensor: QuantizedTensor) -> QuantizedTensor:
    books = {
        name: part.roll(1, dims=2)
        for name, part in tensor.parts.items()
        if name.startswith("codebook_")
    }
    return tensor.replace_parts(codes=tensor.parts["codes"].roll(1, dims=0), **books)


def make_subject(
    tensor: QuantizedTensor,
    m: int,
    device: Device,
    *,
    dtype: str = "float32",
    seed: int = 0,
    place: str | None = None,
    kept: Path | None = None,
) -> Subject:
    """A subject with normal activations; x is rounded to `dtype` before the reference sees it.

    tensor: on the CPU. place: where arrays go, if not on the device (an interpreter of GPU
    kernels has them on the CPU). kept: a file with what the oracle said of these same arguments,
    written where it isn't there: the oracle takes seconds for a large layer.
    """
    problem = Problem(
        m=m,
        n=tensor.n,
        k=tensor.k,
        spec=tensor.spec,
        dtype=dtype,  # type: ignore[arg-type]  # Problem's Literal; the caller's choices are checked
        bias=tensor.bias is not None,
    )
    place = place or device.torch_name
    placed = tensor if place == "cpu" else tensor.widened().to(place)
    # drawn on the CPU: the same tokens on every device
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2 * m, tensor.k, generator=generator).to(problem.torch_dtype).to(place)
    if kept is not None and kept.exists():
        expected, controls = _read(kept, place)
    else:
        expected = oracle.reference(placed, both)
        controls = oracle.negative_controls(placed, both[:m])
        if kept is not None:
            _write(kept, expected, controls)
    return Subject(
        tensor=tensor,
        problem=problem,
        device=device,
        xs=(both[:m].clone(), both[m:].clone()),
        references=(expected.tokens(0, m), expected.tokens(m, 2 * m)),
        controls=controls,
        place=place,
        placed=placed,
    )


def _write(path: Path, expected: Reference, controls: dict[str, bool]) -> None:
    facts = {"depth": str(expected.depth), "controls": json.dumps(controls)}
    arrays = {"y": expected.y.cpu(), "spread": expected.spread.cpu()}
    write_atomically(path, [save(arrays, facts)])


def _read(path: Path, place: str) -> tuple[Reference, dict[str, bool]]:
    with safe_open(path, "pt", device=place) as file:
        facts = file.metadata()
        expected = Reference(file.get_tensor("y"), file.get_tensor("spread"), int(facts["depth"]))
    return expected, json.loads(facts["controls"])


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An output between guards, poisoned with NaN."""

    whole: Tensor
    out: Tensor

    @classmethod
    def make(cls, problem: Problem, place: str) -> Buffer:
        """A buffer for a problem's y."""
        size = problem.m * problem.n
        whole = torch.full((size + 2 * _GUARD,), _SENTINEL, dtype=problem.torch_dtype, device=place)
        buffer = cls(whole, whole[_GUARD : _GUARD + size].view(problem.m, problem.n))
        buffer.poison()
        return buffer

    def poison(self) -> None:
        """Fill what a kernel has to write."""
        self.out.fill_(float("nan"))

    def copy(self) -> Buffer:
        """What it holds now."""
        whole = self.whole.clone()
        return Buffer(whole, whole[_GUARD : _GUARD + self.out.numel()].view(self.out.shape))

    def guards_hold(self) -> bool:
        """Whether nothing was written beside it."""
        guards = torch.cat([self.whole[:_GUARD], self.whole[-_GUARD:]])
        return bool((guards == torch.tensor(_SENTINEL, dtype=guards.dtype)).all())
