"""Which kernel serves a problem, and `vq_linear`: the product as an operator of torch.

`select` walks `ORDER` and takes the first kernel that supports the problem. `vq_linear` is the
custom operator `vqbench::vq_linear`: torch.compile sees one node with a fake implementation, and
autograd has a gradient for x (grad_y times the decoded weight). An operator takes tensors, numbers
and strings only, so a weight travels as its parts in `part_table`'s order (a bias last) beside its
spec as JSON.

A weight is packed once for a kernel. It is known by the storages of its parts, since an autograd or
compiled graph may hand over other tensors on the same memory; storages are held weakly, so that the
packed form goes with the first of its parts, and version counters tell a change in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vqkernels.device import Device, detect, detect_cpu
from vqkernels.errors import BackendError, TensorError, UnsupportedError
from vqkernels.kernel import Kernel, Packed, Registry, Run
from vqkernels.kernel import registry as known_kernels
from vqkernels.parts import part_table
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["ORDER", "Choice", "Regime", "apply_parts", "select", "spec_text", "vq_linear"]


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
# dense product hides the decode. The torch kernels are what is left without numba or Triton.
_GATHER = ("numba/fused_rq", "numba/vectorized", "numba/dequant")
ORDER = (
    Regime("cpu", 8, ("numba/table", *_GATHER, "torch/table", "torch/dequant")),
    Regime("cpu", 32, (*_GATHER, "torch/dequant")),
    Regime("cpu", None, ("numba/dequant", "torch/dequant")),
    Regime("cuda", 7, ("triton/fused_rq", "triton/vectorized", "triton/dequant", "torch/dequant")),
    Regime("cuda", 128, ("triton/mma", "triton/dequant", "torch/dequant")),
    Regime("cuda", None, ("triton/dequant", "torch/dequant")),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and config for a problem, and in a sentence why these."""

    kernel: Kernel
    config: Config
    why: str


@dataclasses.dataclass(frozen=True)
class _Place:
    """A device as the key of a cache: its peak rates are a mapping, which has no hash."""

    device: Device

    def __hash__(self) -> int:
        return hash((self.device.torch_name, self.device.slug, self.device.units))


def select(problem: Problem, device: Device, registry: Registry | None = None) -> Choice:
    """The kernel and config that serve `problem`: the first of `ORDER` that supports it.

    Cached by problem and device, unless a registry other than the process's own is given. Raises
    BackendError, with every kernel's refusal, where none does.
    """
    if registry is not None:
        return _select(problem, device, registry)
    return _selected(problem, _Place(device))


@functools.lru_cache(maxsize=4096)
def _selected(problem: Problem, place: _Place) -> Choice:
    return _select(problem, place.device, known_kernels())


def _select(problem: Problem, device: Device, registry: Registry) -> Choice:
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
# packed weights


class _Entry:
    """The packed forms of one weight at one version of its parts."""

    def __init__(self, versions: tuple[int, ...], storages: list[weakref.ref[object]]) -> None:
        self.versions = versions
        self.storages = storages  # their callbacks drop the entry
        self.packs: dict[Hashable, Packed] = {}
        self.lock = threading.Lock()


class _PackCache:
    """Packed weights by what they were packed from and how; safe to share between threads."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, meta: Hashable, parts: Sequence[Tensor], how: Hashable, pack: Callable[[], Packed]
    ) -> Packed:
        """What `pack()` gives for `parts` in the sense of `meta`, called once for each `how`.

        `pack` gives arrays on the CPU; they are kept on the device of the parts.
        """
        entry = self._entry(meta, parts)
        if (packed := entry.packs.get(how)) is not None:
            return packed
        with entry.lock:
            if (packed := entry.packs.get(how)) is None:
                packed = _apart(pack(), parts).to(parts[0].device)
                packed = _share(packed, list(entry.packs.values()))
                entry.packs[how] = packed
        return packed

    def _entry(self, meta: Hashable, parts: Sequence[Tensor]) -> _Entry:
        storages = [part.untyped_storage() for part in parts]
        places = zip(storages, parts, strict=True)
        key = (
            meta,
            *((id(memory), part.storage_offset(), part.stride()) for memory, part in places),
        )
        versions = tuple(_version(part) for part in parts)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.versions != versions:
                # runs wherever the last reference goes, so without the lock; the address of a part
                # isn't free before this has run, so what it drops is the dead entry
                def forget(_: object) -> None:
                    self._entries.pop(key, None)

                entry = _Entry(versions, [weakref.ref(memory, forget) for memory in storages])
                self._entries[key] = entry
        return entry


def _version(part: Tensor) -> int:
    # tensors made under inference mode count no versions
    return -1 if part.is_inference() else part._version


def _apart(packed: Packed, parts: Sequence[Tensor]) -> Packed:
    """The arrays, copied where they lie in a part's memory and so would keep it alive."""
    spans = [(part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()) for part in parts]

    def inside(array: Tensor) -> bool:
        return any(start <= array.data_ptr() < start + size for start, size in spans)

    arrays = packed.arrays.items()
    return Packed({name: array.clone() if inside(array) else array for name, array in arrays})


def _share(packed: Packed, others: list[Packed]) -> Packed:
    """The arrays, those of `others` where they are equal.

    Most configs of a kernel differ in tiles, not in layout: four configs for four m would
    otherwise hold four copies of the codes.
    """
    arrays = dict(packed.arrays)
    for name, array in arrays.items():
        same = [other[name] for other in others if name in other and _equal(other[name], array)]
        arrays[name] = same[0] if same else array
    return Packed(arrays)


def _equal(a: Tensor, b: Tensor) -> bool:
    # as bytes, since torch compares uint16 on no backend yet
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and torch.equal(_bytes(a), _bytes(b))
    )


def _bytes(array: Tensor) -> Tensor:
    return array.contiguous().reshape(-1).view(torch.uint8)


# ------------------------------------------------------------------------------------------------
# the operator


_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

_PACKS = _PackCache()

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


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, place: str, threads: int) -> tuple[Choice, Run]:
    """The choice for a problem, compiled."""
    device = _device(place, threads)
    choice = select(problem, device)
    return choice, choice.kernel.compile(choice.config, problem, device)


_LINEAR = "(Tensor x, Tensor[] parts, str spec, int n, int k) -> Tensor"
_GRADIENT = "(Tensor grad, Tensor[] parts, str spec, int n, int k) -> Tensor"


@torch.library.custom_op("vqbench::vq_linear", mutates_args=(), schema=_LINEAR)
def _product(x: Tensor, parts: list[Tensor], spec: str, n: int, k: int) -> Tensor:
    device = x.device
    if strange := [part.device for part in parts if part.device != device]:
        raise TensorError(f"vq_linear: x is on {device}, a part of the weight on {strange[0]}")
    flat = x.detach().reshape(-1, k).contiguous()
    shape = (*x.shape[:-1], n)
    if flat.shape[0] == 0:
        return x.new_empty(shape)
    if device.type == "cpu":
        flat = flat.float()
    bias = len(parts) > len(_named(spec, n, k, False)[1])
    parsed, _ = _named(spec, n, k, bias)
    problem = Problem(m=flat.shape[0], n=n, k=k, spec=parsed, dtype=_DTYPES[flat.dtype], bias=bias)
    # Triton launches on the current device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        choice, run = _plan(problem, str(device), torch.get_num_threads())

        def pack() -> Packed:
            tensor = _tensor(parts, spec, n, k).to("cpu")
            tensor.validate("vq_linear")
            return choice.kernel.pack(tensor, choice.config, problem)

        key = (choice.kernel.id, choice.config, problem.dtype)
        packed = _PACKS.get((spec, n, k), parts, key, pack)
        out = torch.empty(flat.shape[0], n, dtype=flat.dtype, device=device)
        run(packed, flat, out)
    return out.to(x.dtype).view(shape)


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
