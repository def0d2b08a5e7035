"""VQLinear, a linear layer on a quantised weight; several as one; `replace_linears` for a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vqkernels import heap
from vqkernels.dispatch import apply_parts, spec_text
from vqkernels.errors import TensorError
from vqkernels.formats import open_source
from vqkernels.fuse import fuse
from vqkernels.parts import check_shape, part_table
from vqkernels.source import outline_of
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = ["FusedVQLinear", "VQLinear", "replace_linears"]


class VQLinear(nn.Module):
    """`y = x @ decode(W).T + bias` with W in `spec`: what `nn.Linear` is to a dense weight.

    The parts are buffers under their names in `part_table`, all zero until they are loaded from a
    state dict (`from_quantized` sets them). Buffers keep the dtypes of the format: `half()` or
    `to(dtype)` move nothing but a bias that is a Parameter, since a rounded codebook would be
    another weight. x may have any float dtype that `vq_linear` takes.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: CodebookSpec,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_shape(spec, out_features, in_features)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        table = part_table(spec, out_features, in_features, bias=bias)
        for name, part in table.items():
            self.register_buffer(name, torch.zeros(part.shape, dtype=part.dtype, device=device))
        if not bias:
            self.register_buffer("bias", None)
        self._names = tuple(name for name in table if name != "bias")
        self._spec_text = spec_text(spec)

    @classmethod
    def from_quantized(cls, tensor: QuantizedTensor, bias: Tensor | None = None) -> VQLinear:
        """A layer on the parts of `tensor`, not copied; a `bias` that is a Parameter stays one.

        Raises TensorError for parts that don't fit their format, or two biases.
        """
        tensor.validate("VQLinear")
        if bias is not None and tensor.bias is not None:
            raise TensorError("VQLinear: the tensor holds a bias of its own; pass no other")
        bias = tensor.bias if bias is None else bias
        if bias is not None and tuple(bias.shape) != (tensor.n,):
            raise TensorError(f"VQLinear: the bias is {list(bias.shape)}, not [{tensor.n}]")
        layer = cls(tensor.k, tensor.n, tensor.spec, device="meta")
        for name in layer._names:
            setattr(layer, name, tensor.parts[name])
        layer.bias = bias
        return layer

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, on the layer's own buffers; without the bias."""
        parts = {name: getattr(self, name) for name in self._names}
        return QuantizedTensor(self.spec, self.out_features, self.in_features, parts)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [..., in_features]` to `[..., out_features]`, in x's dtype."""
        parts = [getattr(self, name) for name in self._names]
        shape = (self.out_features, self.in_features)
        return apply_parts(x, parts, self._spec_text, shape, self.bias)

    def extra_repr(self) -> str:
        """Features, whether there is a bias, and the format in short."""
        spec = self.spec
        stages = "+".join(str(entries) for entries in spec.stages)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {spec.method} {stages} x {spec.vector_text} "
            f"along {spec.vector_axis}, {self.quantized.bits.per_weight():.3g} bits"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQLinear:
        stored = {id(buffer) for buffer in self._buffers.values() if buffer is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # torch has no types
        return self


class FusedVQLinear(nn.Module):
    """Layers of one input as one product: `q, k, v = layer(x)`.

    linear: the VQLinear of all their rows. sizes: the output features of each.
    """

    def __init__(self, linear: VQLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        if sum(sizes) != linear.out_features:
            raise TensorError(
                f"FusedVQLinear: {linear.out_features} output features, but sizes of {sum(sizes)}"
            )
        self.linear, self.sizes = linear, list(sizes)

    @classmethod
    def from_quantized(cls, tensors: Sequence[QuantizedTensor]) -> FusedVQLinear:
        """A layer on the rows of all `tensors`. Raises UnsupportedError as `fuse` does."""
        return cls(VQLinear.from_quantized(fuse(tensors)), [one.n for one in tensors])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x: [..., in_features]` to a `[..., size]` for each: views of one result."""
        parts: tuple[Tensor, ...] = torch.split(self.linear(x), self.sizes, dim=-1)
        return parts

    def extra_repr(self) -> str:
        """The output features of each."""
        return f"sizes={self.sizes}"


# ------------------------------------------------------------------------------------------------
# in a model


@dataclasses.dataclass(frozen=True)
class _Site:
    """A linear layer of the model, every name that it has, and the name of its tensor."""

    linear: nn.Linear
    names: tuple[str, ...]
    tensor: str


def replace_linears(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, QuantizedTensor],
    *,
    prefix: str = "",
    strict: bool = True,
) -> list[str]:
    """Put a VQLinear for each `nn.Linear` of `model` that `source` names; returns their names.

    source: what `open_source` takes (a container, a folder of shards, a checkpoint), or tensors by
        name. A tensor belongs to the module whose name, after `prefix`, is the tensor's, with or
        without `.weight`; tensors without the prefix are left alone.
    strict: whether a tensor that finds no module is an error.

    A layer's own bias stays (as its Parameter) where the source holds none. A module under
    several names is replaced under all of them, and so is a layer whose weight is the same
    Parameter. Parts go where the layer's weight is (from the meta device: to the CPU), one matrix
    after the other: a model built on the meta device takes about its quantised size and a layer
    (two where codes are entropy-coded). Raises TensorError or ContainerError, naming module and
    source, before anything is replaced; what names and shapes show, before any data is read.
    """
    if isinstance(source, Mapping):
        tensors, where = source, "the given tensors"
    else:
        tensors, where = open_source(source), str(Path(source))
    wanted = _targets([name for name in tensors if name.startswith(prefix)], prefix, where)
    sites = _sites(model, wanted, where)
    _check_all_used(wanted, sites, f"{where} (prefix {prefix!r})", strict=strict)
    by_tensor: dict[str, list[_Site]] = {name: [] for name in wanted.values()}  # as they lie there
    for site in sites:
        outline = outline_of(tensors, site.tensor)
        _check_size(site, outline.n, outline.k, where)
        by_tensor[site.tensor].append(site)
    replaced: dict[str, VQLinear] = {}
    for name, same in by_tensor.items():
        if same:
            replaced |= _layers(same, tensors[name], where)
            heap.release()
    # from here on nothing can fail
    order = [name for name, _ in model.named_modules(remove_duplicate=False) if name in replaced]
    for name in order:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, replaced[name])
    return order


def _targets(names: list[str], prefix: str, where: str) -> dict[str, str]:
    """Tensor name by module name."""
    targets: dict[str, str] = {}
    for name in names:
        module = name.removeprefix(prefix).removesuffix(".weight")
        if module in targets:
            raise TensorError(
                f"{where}: {targets[module]!r} and {name!r} are both for module {module!r}; "
                f"drop one"
            )
        targets[module] = name
    return targets


def _sites(model: nn.Module, targets: Mapping[str, str], where: str) -> list[_Site]:
    """The layers that are named, and those that share a named layer's weight."""
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name:
            names.setdefault(module, []).append(name)
    tied: dict[int, set[str]] = {}
    for linear, own in names.items():
        found = {targets[name] for name in own if name in targets}
        tied.setdefault(id(linear.weight), set()).update(found)
    sites = []
    for linear, own in names.items():
        found = {targets[name] for name in own if name in targets}
        tensors = sorted(found or tied[id(linear.weight)])
        if len(tensors) > 1:
            raise TensorError(
                f"{where}: module {own[0]!r} is one layer under several names, with the tensors "
                f"{', '.join(tensors)}; keep one of them"
            )
        if tensors:
            _check_plain(linear, own[0], where)
            sites.append(_Site(linear, tuple(own), tensors[0]))
    return sites


def _check_plain(linear: nn.Linear, name: str, where: str) -> None:
    if type(linear) is not nn.Linear:
        raise TensorError(
            f"{where}: module {name!r} is a {type(linear).__name__}, not a plain nn.Linear; its "
            f"owner may read the weight itself, so replace it by hand"
        )
    if linear._forward_hooks or linear._forward_pre_hooks:
        raise TensorError(
            f"{where}: module {name!r} has forward hooks, which would be lost; remove them"
        )


def _check_all_used(
    targets: Mapping[str, str], sites: list[_Site], where: str, *, strict: bool
) -> None:
    used = {name for site in sites for name in site.names}
    unused = [tensor for module, tensor in targets.items() if module not in used]
    if not strict:
        return
    if unused:
        raise TensorError(
            f"{where}: tensor {unused[0]!r} names no nn.Linear of the model; "
            f"set prefix, or strict=False to skip it"
        )
    if not sites:
        raise TensorError(f"{where}: no tensor is for this model; check the prefix")


def _check_size(site: _Site, n: int, k: int, where: str) -> None:
    shape = [site.linear.out_features, site.linear.in_features]
    if [n, k] != shape:
        raise TensorError(
            f"{where}: tensor {site.tensor!r} is [{n}, {k}], but module {site.names[0]!r} "
            f"is {shape}; it was made for another model"
        )


def _layers(sites: list[_Site], tensor: QuantizedTensor, where: str) -> dict[str, VQLinear]:
    """Layers on `tensor` by name, for sites that are one, or whose weights are one."""
    first = sites[0]
    _check_size(first, tensor.n, tensor.k, where)  # what was read, whatever the outline said
    place = first.linear.weight.device
    moved = tensor.to("cpu" if place.type == "meta" else place)
    layers: dict[str, VQLinear] = {}
    for site in sites:
        bias = site.linear.bias if tensor.bias is None else None
        try:
            layer = VQLinear.from_quantized(moved, bias)
        except TensorError as error:
            raise TensorError(
                f"{where}: tensor {site.tensor!r} for module {site.names[0]!r}: {error}"
            ) from error
        layers |= dict.fromkeys(site.names, layer.train(site.linear.training))
    return layers
