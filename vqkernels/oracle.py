"""What a kernel's output is held to: a float64 product, a derived bound, and controls of both.

The bound is per element. Rounding errors of an fp32 chain of L steps add up like a random walk
whose steps are u times the partial sums (Higham and Mary, "A new approach to probabilistic
rounding error analysis", 2019). Summed in an order that knows nothing of the values, the partial
sums stay near the line from 0 to y, with a spread below `spread`, the root of the sum of squared
products. So an honest result lies within `FACTOR * sqrt(L) * u * (|y| + 2 * spread)`; the
worst-case bound, L * u * sum of |products|, would let a dropped vector pass. The output's own
rounding, u_out * |y|, is added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import Tensor

from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = ["UNIT_ROUNDOFF", "Check", "Reference", "check", "negative_controls", "reference", "tail"]

UNIT_ROUNDOFF = MappingProxyType({"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8})

# 2 * exp(-FACTOR^2 / 2) bounds the chance that one element strays further (Hoeffding): 5e-11.
FACTOR = 7.0

# Rows decoded at a time: 2^23 float64 weights are 64 MiB.
_CHUNK_WEIGHTS = 1 << 23


@dataclasses.dataclass(frozen=True)
class Reference:
    """`y: [m, n]` and `spread: [m, n]` in float64, and the roundings in a chain."""

    y: Tensor
    spread: Tensor
    depth: int

    def rows(self, start: int, stop: int) -> Reference:
        """The reference of output rows `start..stop-1`."""
        return Reference(self.y[:, start:stop], self.spread[:, start:stop], self.depth)

    def tokens(self, start: int, stop: int) -> Reference:
        """The reference of tokens `start..stop-1`."""
        return Reference(self.y[start:stop], self.spread[start:stop], self.depth)


@dataclasses.dataclass(frozen=True)
class Check:
    """The verdict on an output.

    worst: largest |error| over its own bound; the output passes up to 1.
    max_abs: largest |error|. relative_rms: RMS error over the RMS of the reference.
    """

    worst: float
    max_abs: float
    relative_rms: float

    @property
    def passed(self) -> bool:
        """Whether every element is within its bound."""
        return self.worst <= 1.0


def reference(tensor: QuantizedTensor, x: Tensor) -> Reference:
    """The float64 product of `x: [m, k]` with the exact decode, decoded a few rows at a time.

    On the device that both are on.
    """
    wide = x.double()
    # only a bound's size: fp32 is exact enough, at half the traffic; scaled, since 1e-30 squared
    # is nothing in fp32
    size = wide.abs().amax(dim=1, keepdim=True).nan_to_num(1, 1, 1).clamp_min(1e-300)
    unit = (wide / size).float().square()
    outputs, squares = [], []
    for part in _row_chunks(tensor):
        outputs.append(wide @ part.decode().T)
        squares.append(unit @ _squared(part).decode(torch.float32).T)
    y, square = torch.cat(outputs, dim=1), torch.cat(squares, dim=1).double() * size.square()
    if tensor.bias is not None:
        y, square = y + tensor.bias.double(), square + tensor.bias.double().square()
    return Reference(y, square.sqrt(), _depth(tensor.spec, tensor.k))


def check(
    out: Tensor,
    expected: Reference,
    *,
    accumulate: str = "float32",
    weights: str | None = None,
    chain: int = 0,
) -> Check:
    """Hold `out: [m, n]` against the reference; bounds from `accumulate` and out's dtype.

    weights: dtype that each decoded weight was rounded to, where a kernel does that; `chain`
    products at a time were summed in it too (0: none). A NaN or infinity must stand exactly where
    the reference has one. Both on one device.
    """
    y, u = expected.y, UNIT_ROUNDOFF
    bound = FACTOR * math.sqrt(expected.depth) * u[accumulate] * (y.abs() + 2 * expected.spread)
    bound = bound + u[str(out.dtype).removeprefix("torch.")] * y.abs()
    if weights is not None:
        # a short chain's roundings add up like the long one's, but start anew with each chain
        bound = bound + FACTOR * math.sqrt(max(1, chain)) * u[weights] * expected.spread
    error = (out.double() - y).abs()
    finite = torch.isfinite(y)
    if not torch.equal(torch.isfinite(out), finite):
        return Check(math.inf, math.inf, math.inf)
    if not bool(finite.all()):
        if not bool(finite.any()):
            return Check(0.0, 0.0, 0.0)
        error, bound, y = error[finite], bound[finite], y[finite]
    tiny = torch.finfo(torch.float32).tiny  # a bound of 0 (all-zero row) admits a denormal only
    rms = float(y.square().mean().sqrt())
    return Check(
        worst=float((error / bound.clamp_min(tiny)).max()),
        max_abs=float(error.max()),
        relative_rms=float(error.square().mean().sqrt()) / rms if rms else 0.0,
    )


def negative_controls(tensor: QuantizedTensor, x: Tensor) -> dict[str, bool]:
    """Outputs that a broken kernel would give, by name: whether the check catches each.

    Made on a slice of rows at the end of the matrix, where tails live. Controls that a format
    can't have (a dropped stage of one) are absent.
    """
    part = tensor.rows(tail(tensor), tensor.n)
    expected = reference(part, x)
    return {name: not check(out, expected).passed for name, out in _broken(part, x, expected)}


def tail(tensor: QuantizedTensor) -> int:
    """The first of some 64 rows at the end, which can be cut off: a part that is soon judged."""
    step = row_step(tensor.spec)
    span = max(step, min(64, tensor.n) // step * step)
    return max(0, (tensor.n - span) // step * step)


def _broken(part: QuantizedTensor, x: Tensor, expected: Reference) -> Iterator[tuple[str, Tensor]]:
    spec, right = part.spec, expected.y.float()
    yield "zeros", torch.zeros_like(right)
    yield "unwritten", torch.full_like(right, math.nan)
    short = right.clone()
    short[:, -1] = 0
    yield "dropped row", short
    for name, mutant in _mutants(part):
        yield name, reference(mutant, x).y.float()
    cut = x.clone()
    cut[:, -min(spec.vector_length, part.k) :] = 0
    yield "dropped tail", reference(part, cut).y.float()


def _mutants(part: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    spec, parts = part.spec, part.parts
    if spec.max_entries > 1:
        book = parts["codebook_0"]
        yield "swapped codebook", part.replace_parts(codebook_0=book.roll(1, dims=2))
        codes = parts["codes"].to(torch.int32, copy=True)
        entries = torch.tensor(spec.stages, dtype=torch.int32, device=codes.device)
        codes[-1] = (codes[-1] + 1) % entries
        yield "off-by-one code", part.replace_parts(codes=codes)
    if len(spec.stages) > 1:
        last = f"codebook_{len(spec.stages) - 1}"
        dropped = {last: torch.zeros_like(parts[last])}
        yield "dropped stage", part.replace_parts(**dropped)


def _squared(tensor: QuantizedTensor) -> QuantizedTensor:
    """A tensor that decodes to the sum of the squares of what `tensor` sums."""
    spec = tensor.spec
    if spec.coefficients:
        spec = dataclasses.replace(spec, coefficients=tuple(c * c for c in spec.coefficients))
    parts = dict(tensor.parts)
    for name, part in parts.items():
        if part.is_floating_point() or part.dtype == torch.int8 or name == "uniform_codes":
            parts[name] = part.float().square()
    return dataclasses.replace(tensor, spec=spec, parts=parts)


def _row_chunks(tensor: QuantizedTensor) -> Iterator[QuantizedTensor]:
    step = row_step(tensor.spec)
    span = max(step, _CHUNK_WEIGHTS // tensor.k // step * step)
    for start in range(0, tensor.n, span):
        yield tensor.rows(start, min(start + span, tensor.n))


def _depth(spec: CodebookSpec, k: int) -> int:
    # products summed over k, a sum over the stages of each entry, the rotation's inner products,
    # and a handful for scale, zero, side columns and bias
    return k + len(spec.stages) + spec.rotation_size + 8
