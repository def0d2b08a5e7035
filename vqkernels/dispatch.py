"""Which kernel serves a problem, and `vq_linear`: the product as an operator of torch.

`select` asks the tuned tables (tuned_lookup says which, in what order). Where none has a valid
entry it walks `ORDER` and takes the first kernel that supports the problem. `vq_linear` is the
custom operator `vqbench::vq_linear`: torch.compile sees one node with a fake implementation, and
autograd has a gradient for x (grad_y times the decoded weight). An operator takes tensors, numbers
and strings only, so a weight travels as its parts in `part_table`'s order (a bias last) beside its
spec as JSON.

A weight is packed once for a kernel: see pack_cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vqkernels import tuned_lookup
from vqkernels.device import Device, detect, detect_cpu
from vqkernels.errors import BackendError, TensorError, UnsupportedError
from vqkernels.kernel import Kernel, Packed, Registry, Run
from vqkernels.kernel import registry as known_kernels
from vqkernels.pack_cache import PackCache
from vqkernels.parts import part_table
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "ORDER",
    "Choice",
    "Regime",
    "apply_parts",
    "default_choice",
    "look_up",
    "select",
    "spec_text",
    "use_tables",
    "vq_linear",
]


@dataclasses.dataclass(frozen=True)
class Regime:
    """Kernels to try, in order, for up to `most_m` tokens (None: any) on a kind of device."""

    kind: Literal["cpu", "cuda"]
    most_m: int | None
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        tokens = "any m" if self.most_m is None else f"m <= {self.most_m}"
        return f"{self.kind}, {tokens}"


# The first regime that fits, then the first kernel in it that supports the problem. On a CPU a
# table serves 8 tokens a pass; gathering repeats its decode every 8 tokens, so that from some 32
# on decoding once and the BLAS win. On a GPU an mma tile is 16 tokens at least, and from 128 on the
# dense product hides the decode. No GPU has measured Triton against CUDA C++ yet: Triton's come
# first, CUDA's take what those refuse. The torch kernels are what is left without all of these.
_GATHER = ("numba/fused_rq", "numba/vectorized", "numba/dequant")
_DECODE = ("triton/dequant", "cuda/dequant", "torch/dequant")
ORDER = (
    Regime("cpu", 8, ("numba/table", *_GATHER, "torch/table", "torch/dequant")),
    Regime("cpu", 32, (*_GATHER, "torch/dequant")),
    Regime("cpu", None, ("numba/dequant", "torch/dequant")),
    Regime("cuda", 7, ("triton/fused_rq", "triton/vectorized", "cuda/vectorized", *_DECODE)),
    Regime("cuda", 128, ("triton/mma", *_DECODE)),
    Regime("cuda", None, _DECODE),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and config for a problem, and in a sentence why these. table: what named them."""

    kernel: Kernel
    config: Config
    why: str
    table: Path | None = None


@dataclasses.dataclass(frozen=True)
class _Place:
    """A device as the key of a cache: its peak rates are a mapping, which has no hash."""

    device: Device

    def __hash__(self) -> int:
        return hash((self.device.torch_name, self.device.slug, self.device.units))


def select(problem: Problem, device: Device, registry: Registry | None = None) -> Choice:
    """The kernel and config that serve `problem`: a tuned table's, or `default_choice`'s.

    Cached by problem and device, unless a registry other than the process's own is given. Raises
    BackendError, with every kernel's refusal, where none does.
    """
    if registry is not None:
        return look_up(problem, device, registry)[0]
    return _selected(problem, _Place(device))


@functools.lru_cache(maxsize=4096)
def _selected(problem: Problem, place: _Place) -> Choice:
    return look_up(problem, place.device)[0]


def use_tables(path: str | Path | None) -> None:
    """Look for tuned configs in `path` first, a table or a folder of them; None: no longer.

    `"off"`: nowhere at all. Reads all tables again; a weight is packed again only where the choice
    has changed.
    """
    tuned_lookup.set_explicit(path)
    _selected.cache_clear()
    _plan.cache_clear()


def look_up(
    problem: Problem, device: Device, registry: Registry | None = None
) -> tuple[Choice, tuned_lookup.Answer]:
    """As `select`, uncached, with what each tuned table said."""
    found = registry or known_kernels()
    default = default_choice(problem, device, found)

    def default_of(other: Problem) -> tuple[Kernel, Config]:
        choice = default if other == problem else default_choice(other, device, found)
        return choice.kernel, choice.config

    answer = tuned_lookup.find(problem, device, found, default_of)
    if answer.choice is None:
        ignored = answer.refusals
        why = f"{default.why}; {ignored}" if ignored else default.why
        return dataclasses.replace(default, why=why), answer
    served = answer.findings[-1]
    kernel, config = answer.choice
    return Choice(kernel, config, str(served), served.path), answer


def default_choice(problem: Problem, device: Device, registry: Registry | None = None) -> Choice:
    """The first kernel of `ORDER` that supports `problem`, in its default config.

    Raises BackendError, with every kernel's refusal, where none does.
    """
    registry = registry or known_kernels()
    regime = next(
        one
        for one in ORDER
        if one.kind == device.kind and (one.most_m is None or problem.m <= one.most_m)
    )
    refusals: list[str] = []
    for kernel_id in regime.kernels:
        kernel = registry.kernels.get(kernel_id)
        if kernel is None:
            reason: str | None = registry.missing.get(kernel_id.replace("/", "."), "not installed")
        else:
            reason = kernel.supports(problem, device)
            if reason is None:
                passed = "".join(f"; not {refusal}" for refusal in refusals)
                why = f"default order ({regime}){passed}"
                return Choice(kernel, kernel.default(problem, device), why)
        refusals.append(f"{kernel_id} ({reason})")
    raise BackendError(
        f"no kernel takes m={problem.m}, n={problem.n}, k={problem.k} in {problem.dtype} on "
        f"{device.name}: {'; '.join(refusals)}; install a backend or use another format"
    )


# ------------------------------------------------------------------------------------------------
# the operator


_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

_PACKS = PackCache()

_SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(CodebookSpec))


def vq_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`x: [..., k]` times the transposed weight, plus a bias `[n]`: `[..., n]` in x's dtype.

    x: float32, float16 or bfloat16; on a CPU the half dtypes are computed in float32. Gradients
    go to x, and to a `bias` that requires one; the weight gets none. The weight is checked and
    packed at the first call (make one before a CUDA graph is captured) and again after a part was
    changed in place; the packed form is freed with the parts. A change through `Tensor.data`, or
    of a tensor made under inference mode, can't be noticed. Raises TensorError for operands that
    don't fit, UnsupportedError for another dtype, BackendError where no kernel is there.
    """
    if bias is not None and "bias" in weight.parts:
        raise TensorError("vq_linear: the weight holds a bias of its own; pass no other")
    names = part_table(weight.spec, weight.n, weight.k)
    if missing := [name for name in names if name not in weight.parts]:
        raise TensorError(f"vq_linear: part {missing[0]!r} is missing; quantise the layer again")
    parts = [weight.parts[name] for name in names]
    bias = weight.parts.get("bias") if bias is None else bias
    return apply_parts(x, parts, spec_text(weight.spec), (weight.n, weight.k), bias)


def apply_parts(
    x: Tensor, parts: list[Tensor], spec: str, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """`vq_linear` on a weight already taken apart: parts in order, `spec_text`, `(n, k)`."""
    n, k = shape
    if x.dtype not in _DTYPES:
        raise UnsupportedError(
            f"vq_linear: x is {x.dtype}; convert it to float32, float16 or bfloat16"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise TensorError(f"vq_linear: x is {list(x.shape)}, but the weight takes [..., {k}]")
    y: Tensor
    if bias is None or (bias.requires_grad and torch.is_grad_enabled()):
        # a bias in training changes with every step, and packed with the weight would repack it
        y = _product(x, parts, spec, n, k)
        return y if bias is None else y + bias.to(x.dtype)
    y = _product(x, [*parts, bias], spec, n, k)
    return y


def spec_text(spec: CodebookSpec) -> str:
    """The spec as JSON, as the operator takes it; torch.compile folds it into a constant."""
    # the compiler looks through a cache, and warns that it does
    return _spec_json(spec) if torch.compiler.is_compiling() else _cached_text(spec)


def _spec_json(spec: CodebookSpec) -> str:
    # by hand, for torch.compile can't trace `json`; no value of a spec needs escapes
    fields = [f'"{name}": {_json(getattr(spec, name))}' for name in _SPEC_FIELDS]
    return "{" + ", ".join(fields) + "}"


def _json(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(item) for item in value]) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)


_cached_text = functools.lru_cache(maxsize=1024)(_spec_json)


@functools.lru_cache(maxsize=4096)
def _named(spec: str, n: int, k: int, bias: bool) -> tuple[CodebookSpec, tuple[str, ...]]:
    parsed = CodebookSpec.from_dict(json.loads(spec))
    return parsed, tuple(part_table(parsed, n, k, bias=bias))


def _tensor(parts: Sequence[Tensor], spec: str, n: int, k: int) -> QuantizedTensor:
    """The weight that the operator's arguments stand for; a bias of any dtype becomes fp32."""
    bias = len(parts) > len(_named(spec, n, k, False)[1])
    parsed, names = _named(spec, n, k, bias)
    if len(parts) != len(names):
        raise TensorError(f"vq_linear: {len(parts)} parts; the format has {', '.join(names)}")
    named = {name: part.detach() for name, part in zip(names, parts, strict=True)}
    if bias:
        named["bias"] = named["bias"].float()
    return QuantizedTensor(parsed, n, k, named)


@functools.lru_cache(maxsize=64)
def _device(name: str, threads: int) -> Device:
    return detect_cpu(threads) if name == "cpu" else detect(name)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a call is served: its problem, the choice, compiled, and the key of its packed weight."""

    problem: Problem
    choice: Choice
    run: Run
    packing: Hashable


@functools.lru_cache(maxsize=4096)
def _plan(
    m: int, dtype: torch.dtype, spec: str, n: int, k: int, parts: int, place: str, threads: int
) -> _Plan:
    """The plan for `m` tokens; keyed by what a call has at hand, since a Problem takes 2 us."""
    bias = parts > len(_named(spec, n, k, False)[1])
    parsed, _ = _named(spec, n, k, bias)
    problem = Problem(m=m, n=n, k=k, spec=parsed, dtype=_DTYPES[dtype], bias=bias)
    device = _device(place, threads)
    choice, run = _compiled(problem, device)
    return _Plan(problem, choice, run, (choice.kernel.id, choice.config, problem.dtype))


def _compiled(problem: Problem, device: Device) -> tuple[Choice, Run]:
    """The choice for a problem, compiled; the default where a table's doesn't compile."""
    choice = select(problem, device)
    try:
        return choice, choice.kernel.compile(choice.config, problem, device)
    except Exception as error:  # a compiler may fail in any way
        if choice.table is None:
            raise
        text = f"{choice.kernel.id} doesn't compile ({tuned_lookup.one_line(error)})"
        tuned_lookup.warn_once(choice.table, "compile", text)
    choice = default_choice(problem, device)
    return choice, choice.kernel.compile(choice.config, problem, device)


_LINEAR = "(Tensor x, Tensor[] parts, str spec, int n, int k) -> Tensor"
_GRADIENT = "(Tensor grad, Tensor[] parts, str spec, int n, int k) -> Tensor"


@torch.library.custom_op("vqbench::vq_linear", mutates_args=(), schema=_LINEAR)
def _product(x: Tensor, parts: list[Tensor], spec: str, n: int, k: int) -> Tensor:
    device = x.device
    if strange := [part.device for part in parts if part.device != device]:
        raise TensorError(f"vq_linear: x is on {device}, a part of the weight on {strange[0]}")
    # views cost 1 to 2 us each, as much as a launch: only where something changes
    flat = x.detach() if x.dim() == 2 else x.detach().reshape(-1, k)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n)
    if device.type == "cpu":
        flat = flat.float()
    with _current(device):
        out = _run(flat.contiguous(), parts, spec, n, k)
    if out.dtype != x.dtype:
        out = out.to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; entering one that is current costs 2 us."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _run(x: Tensor, parts: list[Tensor], spec: str, n: int, k: int) -> Tensor:
    """The product with `x: [m, k]`, in a dtype that kernels take."""
    threads = torch.get_num_threads()
    plan = _plan(x.shape[0], x.dtype, spec, n, k, len(parts), str(x.device), threads)

    def pack() -> Packed:
        tensor = _tensor(parts, spec, n, k).to("cpu")
        tensor.validate("vq_linear")
        return plan.choice.kernel.pack(tensor, plan.choice.config, plan.problem)

    packed = _PACKS.get((spec, n, k), parts, plan.packing, pack)
    out = x.new_empty(x.shape[0], n)
    plan.run(packed, x, out)
    return out


@_product.register_fake
def _(x: Tensor, _parts: list[Tensor], _spec: str, n: int, _k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("vqbench::vq_linear_gradient", mutates_args=(), schema=_GRADIENT)
def _gradient(grad: Tensor, parts: list[Tensor], spec: str, n: int, k: int) -> Tensor:
    """grad_x `[..., k]`; decodes the whole weight in float32 for the call."""
    weight = _tensor(parts, spec, n, k).decode(torch.float32)
    wide = torch.float32 if grad.device.type == "cpu" else grad.dtype
    return (grad.detach().to(wide) @ weight.to(wide)).to(grad.dtype)


@_gradient.register_fake
def _(grad: Tensor, _parts: list[Tensor], _spec: str, _n: int, k: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    _, parts, *ctx.meta = inputs
    # saved as autograd does: a part changed in place before the backward pass is an error
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    return _gradient(grad, parts, *ctx.meta), [None] * len(parts), None, None, None


def _backward_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts, (spec, n, k) = list(ctx.saved_tensors), ctx.meta
    # the gradient has no bias in it
    plain = parts[: len(_named(spec, n, k, False)[1])]
    return _product(grad, plain, spec, n, k), [None] * len(parts), None, None, None


_product.register_autograd(_backward, setup_context=_keep)
_gradient.register_autograd(_backward_again, setup_context=_keep)
