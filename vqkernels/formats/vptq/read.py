"""Matrices of a VPTQ checkpoint, read and checked one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vqkernels.errors import ContainerError, SpecError, TensorError, VqError
from vqkernels.formats.checkpoint import CONFIG, Checkpoint, CheckpointSource
from vqkernels.formats.vptq.layer import FLOATS, Layer, Stored, is_kept, owners
from vqkernels.packing import unpack_codes
from vqkernels.parts import part_table
from vqkernels.source import Outline
from vqkernels.tensor import QuantizedTensor

__all__ = ["VptqSource", "dequantize"]

_PIECE = 1 << 19  # code bits unpacked at once: less than 1 MB of temporary numbers

_AGAIN = "copy or download the checkpoint again"


class VptqSource(CheckpointSource):
    """The quantised modules of a VPTQ checkpoint, by module name.

    Every layout that the upstream wrote is read: codes packed or not, groups, residuals, outlier
    columns, permutation, scale and bias by column or row. Values keep the dtype they are stored
    in (config.json's torch_dtype has no say). Raises ContainerError, SpecError or TensorError,
    one line, where config and headers disagree, and at a lookup where the data is invalid.

    skip_bad: pass over modules whose config or headers are wrong; `refused` then says why, by name.
    """

    def __init__(self, checkpoint: Checkpoint, *, skip_bad: bool = False) -> None:
        super().__init__(checkpoint, "vptq")
        self._config = checkpoint.folder / CONFIG
        self._keys = _keys_by_module(checkpoint)
        self._layers: dict[str, Layer] = {}
        for name, config in self._configs().items():
            try:
                with _located(f"{self._config}: module {name!r}"):
                    layer = Layer.from_config(config)
                self._outlines[name] = self._check_headers(name, layer)
            except VqError as error:
                if not skip_bad:
                    raise
                self.refused[name] = str(error)
            else:
                self._layers[name] = layer
        self._check_strays()

    def __getitem__(self, name: str) -> QuantizedTensor:
        layer, outline = self._layers[name], self._outlines[name]
        parts = dict(self._parts(name, layer))
        order = part_table(outline.spec, outline.n, outline.k, bias=outline.bias)
        tensor = QuantizedTensor(outline.spec, outline.n, outline.k, {p: parts[p] for p in order})
        tensor.validate(f"{self.checkpoint.folder}: module {name!r}")
        return tensor

    # --------------------------------------------------------------------------------------------
    # config and headers

    def _configs(self) -> dict[str, Any]:
        """The config of each quantised module: its own, or that of its name's last part."""
        quantization = self.checkpoint.quantization
        named = _mapping(quantization, "config_for_layers", self._config)
        shared = _mapping(quantization, "shared_layer_config", self._config)
        kept = _kept(quantization, self._config)
        configs = {name: config for name, config in named.items() if not is_kept(name, kept)}
        for name in self._keys:
            tail = name.rpartition(".")[2]
            if name in named or tail not in shared or is_kept(name, kept):
                continue
            if f"{name}.weight" in self._keys[name]:
                raise ContainerError(
                    f"{self.checkpoint.folder}: tensor {f'{name}.weight'!r} is dense, but "
                    f"shared_layer_config quantises every {tail!r}; add {name!r} to "
                    f"modules_to_not_convert"
                )
            configs[name] = shared[tail]
        if not configs:
            raise ContainerError(
                f"{self._config}: quantization_config names no module of the checkpoint; {_AGAIN}"
            )
        return configs

    def _check_headers(self, name: str, layer: Layer) -> Outline:
        """The module's outline, once its tensors are those that its config asks for."""
        present = self._keys.get(name, frozenset())
        bias = f"{name}.bias" in present if layer.bias is None else layer.bias
        dtype = self.checkpoint.dtype(f"{name}.centroids.weight")
        table = layer.stored((dtype,) if dtype in FLOATS else FLOATS, bias=bias)
        for suffix, stored in table.items():
            self._check_header(f"{name}.{suffix}", stored)
        if extra := sorted(present - {f"{name}.{suffix}" for suffix in table}):
            raise ContainerError(
                f"{self.checkpoint.file(extra[0])}: tensor {extra[0]!r} is there, but {CONFIG} "
                f"asks for none; correct {CONFIG}, or remove the tensor"
            )
        with _located(f"{self._config}: module {name!r}"):
            return layer.outline(dtype, bias=bias)

    def _check_header(self, key: str, stored: Stored) -> None:
        shape, dtype = self.checkpoint.shape(key), self.checkpoint.dtype(key)
        if shape != stored.shape or dtype not in stored.dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in stored.dtypes)
            raise ContainerError(
                f"{self.checkpoint.file(key)}: tensor {key!r} is "
                f"{str(dtype).removeprefix('torch.')} {list(shape)}, but {CONFIG} asks for "
                f"{wanted} {list(stored.shape)}; {_AGAIN}, or correct {CONFIG}"
            )

    def _check_strays(self) -> None:
        """Every VPTQ tensor belongs to a quantised module, and those have nothing inside them."""
        for name, keys in self._keys.items():
            known = name in self._layers or name in self.refused
            if not known and f"{name}.centroids.weight" in keys:
                raise ContainerError(
                    f"{self._config}: module {name!r} holds VPTQ tensors, but has no entry in "
                    f"config_for_layers or shared_layer_config, or is in modules_to_not_convert; "
                    f"correct the config"
                )
            if owner := next((o for o in owners(name) if o in self._layers), None):
                raise ContainerError(
                    f"{self.checkpoint.folder}: tensor {min(keys)!r} lies in module {owner!r}, "
                    f"which is quantised; remove it"
                )

    # --------------------------------------------------------------------------------------------
    # data

    def _parts(self, name: str, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        outline = self._outlines[name]
        length, sets = layer.vector_length, layer.groups
        yield "codes", self._codes(name, layer, outline)
        book = self._floats(f"{name}.centroids.weight")
        yield "codebook_0", book.reshape(sets, 1, layer.entries, length)
        if layer.residual_entries:
            book = self._floats(f"{name}.res_centroids.weight")
            yield "codebook_1", book.reshape(sets, 1, layer.residual_entries, length)
        if layer.outliers:
            codes = self._short_codes(f"{name}.outlier_indices", layer.outlier_entries)
            wide = layer.outlier_entries > 256
            yield "outlier_codes", codes[0].to(torch.uint16 if wide else torch.uint8)
            book = self._floats(f"{name}.outlier_centroids.weight")
            shape = (layer.outlier_entries, layer.outlier_vector_length)
            yield "outlier_codebook", book.reshape(shape)
        if layer.permuted:
            yield "permutation", self._permutation(f"{name}.perm")
        if layer.norm_dim is not None:
            yield "scale", self._floats(f"{name}.weight_scale")
            yield "zero", self._floats(f"{name}.weight_bias")
        if outline.bias:
            yield "bias", self._floats(f"{name}.bias").to(torch.float32)

    def _floats(self, key: str) -> Tensor:
        values = self.checkpoint.read(key)
        if not bool(torch.isfinite(values).all()):
            raise self._damaged(key, "holds NaN or infinity")
        return values

    def _codes(self, name: str, layer: Layer, outline: Outline) -> Tensor:
        """Codes `[rows, columns, stages]`, group after group along the columns."""
        part = outline.table()["codes"]
        codes = torch.empty(part.shape, dtype=part.dtype)
        if layer.packed:
            self._unpack(f"{name}.indices", layer, codes)
            return codes
        keys = {"indices": layer.entries, "res_indices": layer.residual_entries}
        for stage, (suffix, entries) in enumerate(list(keys.items())[: part.shape[2]]):
            read = self._short_codes(f"{name}.{suffix}", entries)
            codes[..., stage] = read.permute(1, 0, 2).reshape(part.shape[:2]).to(part.dtype)
        return codes

    def _unpack(self, key: str, layer: Layer, codes: Tensor) -> None:
        words, bits, size = self.checkpoint.read(key), layer.code_bits, layer.group_size
        used = size * sum(bits) % 32
        # an arithmetic shift: a set top bit stays set
        if used and bool((words[..., -1] >> used).any()):
            raise self._damaged(key, "has bits set after the last code of a row")
        step = max(1, _PIECE // (size * sum(bits)))
        for group in range(layer.groups):
            columns = slice(group * size, (group + 1) * size)
            for start in range(0, codes.shape[0], step):
                piece = unpack_codes(words[group, start : start + step], size, bits)
                codes[start : start + step, columns] = piece.to(codes.dtype)

    def _short_codes(self, key: str, entries: int) -> Tensor:
        """The uint16 bits of tensor `key` as int32, each below `entries`."""
        codes = self.checkpoint.read(key).view(torch.uint16).to(torch.int32)
        if (top := int(codes.max())) >= entries:
            raise self._damaged(key, f"reaches {top}, but its codebook has {entries} entries")
        return codes

    def _permutation(self, key: str) -> Tensor:
        stored = self.checkpoint.read(key)
        short = stored.dtype in (torch.int16, torch.uint16)
        order = stored.view(torch.uint16).long() if short else stored.long()
        count = order.numel()
        if not torch.equal(order.sort().values, torch.arange(count)):
            raise self._damaged(key, f"names an input twice, or one outside 0..{count - 1}")
        return order.to(torch.uint16 if count <= 65536 else torch.int32)

    def _damaged(self, key: str, what: str) -> TensorError:
        return TensorError(f"{self.checkpoint.file(key)}: tensor {key!r} {what}; {_AGAIN}")


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """The weight `[n, k]` in the dtype of its codebooks, with the roundings of vptq's torch path.

    That path sums the two codebooks, scales and adds the bias one after the other, each rounded
    to that dtype (its CUDA kernels fuse the last two). Raises UnsupportedError for what is no
    VPTQ layer.
    """
    spec = tensor.spec
    outline = Outline(spec=spec, n=tensor.n, k=tensor.k, bias=tensor.bias is not None)
    Layer.from_outline(outline, packed=False)  # whichever it was: the sum is the same
    dtype: torch.dtype = getattr(torch, spec.codebook_dtype)
    return tensor.decode(dtype)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except SpecError as error:
        raise type(error)(f"{where}: {error}; correct it, or quantise again") from error


def _keys_by_module(checkpoint: Checkpoint) -> dict[str, frozenset[str]]:
    """The keys of each module that holds a tensor; `x.centroids.weight` counts as `x`'s."""
    modules: dict[str, set[str]] = {}
    for key in checkpoint.keys():  # noqa: SIM118
        owner, _, last = key.rpartition(".")
        parent, _, book = owner.rpartition(".")
        of_layer = last == "weight" and book in ("centroids", "res_centroids", "outlier_centroids")
        modules.setdefault(parent if of_layer else owner, set()).add(key)
    return {name: frozenset(keys) for name, keys in modules.items()}


def _mapping(quantization: Mapping[str, Any], field: str, path: object) -> dict[str, Any]:
    value = quantization.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ContainerError(f"{path}: {field} is no JSON object; {_AGAIN}")
    return value


def _kept(quantization: Mapping[str, Any], path: object) -> list[str]:
    value = quantization.get("modules_to_not_convert")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ContainerError(f"{path}: modules_to_not_convert is no list of names; {_AGAIN}")
    return value
