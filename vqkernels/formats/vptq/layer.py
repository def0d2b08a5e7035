"""One VPTQ layer as its config describes it: the format, and the tensors it needs.

A weight `[out, in]` is cut into vectors along out; group `g` of the columns has codebooks of its
own. In a packed layer the main code has the low bits of a cell and the residual one the high bits
(Liu et al., 2024, arXiv:2409.17066). -1 (or 0) in a config means that the part is absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vqkernels.errors import SpecError, UnsupportedError
from vqkernels.formats.checkpoint import shortened
from vqkernels.packing import packed_words
from vqkernels.parts import check_shape, codebook_sets
from vqkernels.source import Outline
from vqkernels.spec import MAX_ENTRIES, Axis, CodebookSpec

__all__ = ["FLOATS", "PERMUTATIONS", "SHORTS", "Layer", "Stored", "is_kept", "owners"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# uint16 bits; as int16 or float16 because NCCL and older safetensors have no uint16
SHORTS = (torch.int16, torch.uint16, torch.float16)
# an unpacked layer keeps whole numbers
PERMUTATIONS = (torch.int16, torch.uint16, torch.int64, torch.int32)

_REQUIRED = (
    "in_features", "out_features", "vector_lens", "num_centroids", "num_res_centroids",
    "group_num", "enable_norm", "enable_perm", "is_indice_packed",
)  # fmt: skip
# the last two have no say in decoding
_OPTIONAL = (
    "group_size", "outlier_size", "norm_dim", "bias", "indices_as_float", "vector_quant_dim",
    "enable_proxy_error", "debug",
)  # fmt: skip
_MAX_COUNT = 1 << 32  # sizes beyond it are no layer's; products with it stay exact
_ALONG: Axis = "out"


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a tensor of a checkpoint has to be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A VPTQ layer, checked. `residual_entries`, `outliers`: 0 where there are none.

    norm_dim: scale and bias are per input column (0) or output row (1); None: there are none.
    bias: None where the config leaves it to the model.
    """

    in_features: int
    out_features: int
    vector_length: int
    entries: int
    residual_entries: int
    groups: int
    group_size: int
    outliers: int
    outlier_vector_length: int
    outlier_entries: int
    norm_dim: int | None
    permuted: bool
    packed: bool
    bias: bool | None

    @classmethod
    def from_config(cls, config: object) -> Layer:
        """The layer of an entry of config_for_layers or shared_layer_config.

        Raises SpecError where fields are missing or contradict each other, and UnsupportedError
        for what the upstream reads wrongly.
        """
        if not isinstance(config, dict):
            raise SpecError(f"must be a JSON object, not {type(config).__name__}")
        _check_fields(config)
        inputs, outputs = _count(config, "in_features"), _count(config, "out_features")
        outlier_length, length = _pair(config, "vector_lens")
        outlier_entries, entries = _pair(config, "num_centroids")
        outlier_residual, residual = _pair(config, "num_res_centroids")
        outliers, groups = _count(config, "outlier_size", 0), _count(config, "group_num")
        if outlier_residual:
            raise UnsupportedError("num_res_centroids names residuals of outliers; VPTQ has none")
        if not outliers and not (outlier_length > 1 and outlier_entries):
            # as the upstream's own scripts say it too: [1, 8] and [1, 65536]
            outlier_length = outlier_entries = 0
        layer = cls(
            in_features=inputs,
            out_features=outputs,
            vector_length=length,
            entries=entries,
            residual_entries=residual,
            groups=groups,
            group_size=_count(config, "group_size", 0) or (inputs - outliers) // max(1, groups),
            outliers=outliers,
            outlier_vector_length=outlier_length,
            outlier_entries=outlier_entries,
            norm_dim=_norm_dim(config) if _flag(config, "enable_norm") else None,
            permuted=_flag(config, "enable_perm"),
            packed=_flag(config, "is_indice_packed"),
            bias=None if config.get("bias") is None else _flag(config, "bias"),
        )
        layer.check()
        return layer

    @classmethod
    def from_outline(cls, outline: Outline, *, packed: bool) -> Layer:
        """The layer that holds a matrix of ours exactly as it is.

        Raises UnsupportedError where VPTQ can't: what is read back would have another spec.
        """
        spec = outline.spec
        dtype: torch.dtype = getattr(torch, spec.codebook_dtype)
        if dtype not in FLOATS:
            raise UnsupportedError(f"codebooks in {spec.codebook_dtype}, but VPTQ's are floats")
        grouped = spec.group_axis == "column"
        groups = codebook_sets(spec, outline.n, outline.k) if grouped else 1
        layer = cls(
            in_features=outline.k,
            out_features=outline.n,
            vector_length=spec.vector_length,
            entries=spec.stages[0],
            residual_entries=spec.stages[1] if len(spec.stages) > 1 else 0,
            groups=groups,
            group_size=spec.group_size if grouped else outline.k - spec.outlier_columns,
            outliers=spec.outlier_columns,
            outlier_vector_length=spec.outlier_vector_length,
            outlier_entries=spec.outlier_entries,
            norm_dim={"none": None, "row": 1}.get(spec.scale_axis, 0),
            permuted=spec.permuted,
            packed=packed,
            bias=outline.bias,
        )
        layer.check()
        held = layer.outline(dtype, bias=outline.bias).spec
        for field in dataclasses.fields(CodebookSpec):
            asked, has = getattr(spec, field.name), getattr(held, field.name)
            if asked != has:
                raise UnsupportedError(
                    f"{field.name} is {asked!r}, but a VPTQ layer like it has {has!r}"
                )
        if packed and layer.permuted and layer.in_features > MAX_ENTRIES:
            raise UnsupportedError(
                f"a permutation of {layer.in_features} columns, but a packed layer keeps 16 bits"
            )
        return layer

    def check(self) -> None:
        """Raise SpecError or UnsupportedError, as `from_config` says."""
        for field in ("in_features", "out_features", "groups", "group_size", "vector_length"):
            if getattr(self, field) < 1:
                raise SpecError(f"{field} must be at least 1")
        _check_entries("num_centroids", self.entries)
        if self.residual_entries:
            _check_entries("num_res_centroids", self.residual_entries)
        if self.packed and self.residual_entries > self.entries:
            raise UnsupportedError(
                f"{self.residual_entries} residual entries for {self.entries} main ones, packed: "
                f"the upstream reads no more bits of a residual code than of a main one, unless "
                f"the codes are unpacked"
            )
        self._check_outliers()
        if self.groups * self.group_size + self.outliers != self.in_features:
            raise SpecError(
                f"{self.groups} groups of {self.group_size} columns and {self.outliers} outlier "
                f"columns are not {self.in_features} in_features"
            )

    def _check_outliers(self) -> None:
        length, entries = self.outlier_vector_length, self.outlier_entries
        if not self.outliers and (length or entries):
            raise SpecError("vector_lens and num_centroids name outliers, but outlier_size is 0")
        if self.outliers and not (length > 1 and 1 <= entries <= MAX_ENTRIES):
            raise UnsupportedError(
                f"{self.outliers} outlier columns of {entries} entries in vectors of {length}: the "
                f"upstream drops outliers in vectors shorter than 2 or without entries, and a "
                f"code counts to {MAX_ENTRIES}"
            )

    @property
    def code_bits(self) -> tuple[int, ...]:
        """Bits of the main code, and of the residual one where there is one."""
        entries = (self.entries, self.residual_entries)
        return tuple(count.bit_length() - 1 for count in entries if count)

    def outline(self, dtype: torch.dtype, *, bias: bool) -> Outline:
        """The layer as a matrix of ours, its codebooks and sides in `dtype`."""
        axis = {None: "none", 0: "column", 1: "row"}[self.norm_dim]
        name = str(dtype).removeprefix("torch.")
        fields: dict[str, Any] = {
            "method": "vptq",
            "vector_axis": _ALONG,
            "vector_length": self.vector_length,
            "stages": (self.entries, self.residual_entries)[: len(self.code_bits)],
            "group_axis": "column" if self.groups > 1 else "tensor",
            "group_size": self.group_size if self.groups > 1 else 0,
            "codebook_dtype": name,
            "side_dtype": name,
            "scale_axis": axis,
            "zero_axis": axis,
            "permuted": self.permuted,
            "outlier_columns": self.outliers,
            "outlier_entries": self.outlier_entries,
            "outlier_vector_length": self.outlier_vector_length,
        }
        spec = CodebookSpec(**fields)
        check_shape(spec, self.out_features, self.in_features)
        return Outline(spec=spec, n=self.out_features, k=self.in_features, bias=bias)

    def stored(self, dtypes: tuple[torch.dtype, ...], *, bias: bool) -> dict[str, Stored]:
        """The tensors of the layer, by key under its module; floats are of one of `dtypes`."""
        groups, length = self.groups, self.vector_length
        rows = -(-self.out_features // length)
        tensors = {"centroids.weight": Stored((groups, self.entries * length), dtypes)}
        if self.packed:
            words = packed_words(self.group_size, self.code_bits)
            tensors["indices"] = Stored((groups, rows, words), (torch.int32,))
        else:
            tensors["indices"] = Stored((groups, rows, self.group_size), SHORTS)
        if self.residual_entries:
            shape = (groups, self.residual_entries * length)
            tensors["res_centroids.weight"] = Stored(shape, dtypes)
            if not self.packed:
                tensors["res_indices"] = tensors["indices"]
        if self.outliers:
            rows = -(-self.out_features // self.outlier_vector_length)
            shape = (1, self.outlier_entries * self.outlier_vector_length)
            tensors["outlier_centroids.weight"] = Stored(shape, dtypes)
            tensors["outlier_indices"] = Stored((1, rows, self.outliers), SHORTS)
        if self.permuted:
            tensors["perm"] = Stored((self.in_features,), PERMUTATIONS)
        if self.norm_dim is not None:
            size = self.out_features if self.norm_dim else self.in_features
            tensors["weight_scale"] = tensors["weight_bias"] = Stored((size,), dtypes)
        if bias:
            tensors["bias"] = Stored((self.out_features,), dtypes)
        return tensors

    def to_config(self) -> dict[str, Any]:
        """The layer's entry of config_for_layers; `from_config` is the inverse."""
        config: dict[str, Any] = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "vector_lens": [self.outlier_vector_length or -1, self.vector_length],
            "num_centroids": [self.outlier_entries or -1, self.entries],
            "num_res_centroids": [-1, self.residual_entries or -1],
            "group_num": self.groups,
            "group_size": self.group_size,
            "outlier_size": self.outliers,
            "indices_as_float": False,
            "enable_norm": self.norm_dim is not None,
            "enable_perm": self.permuted,
            "is_indice_packed": self.packed,
            "bias": bool(self.bias),
        }
        if self.norm_dim:  # the wheel's VQuantLinear, 0.0.5.post1, knows of no such argument
            config["norm_dim"] = self.norm_dim
        return config


def _check_fields(config: Mapping[str, Any]) -> None:
    if missing := [field for field in _REQUIRED if field not in config]:
        # no defaults: vptq's and transformers' differ (enable_norm is off in one, on in the other)
        raise SpecError(f"field {missing[0]!r} is missing")
    if unknown := sorted(set(config) - set(_REQUIRED) - set(_OPTIONAL)):
        raise UnsupportedError(
            f"field {unknown[0]!r} is unknown, and could change what the codes mean"
        )
    if config.get("vector_quant_dim", _ALONG) != _ALONG:
        raise UnsupportedError('vector_quant_dim is not "out", which is all that VPTQ implements')


def _check_entries(field: str, entries: int) -> None:
    if not 2 <= entries <= MAX_ENTRIES or entries & (entries - 1):
        raise UnsupportedError(
            f"{field} names {entries} entries; the upstream rounds the width of a code down, so "
            f"only a power of two from 2 to {MAX_ENTRIES} can be read"
        )


def _whole(field: str, value: object) -> int:
    # True is an int to Python
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value <= _MAX_COUNT:
        raise SpecError(
            f"{field} must be a whole number up to {_MAX_COUNT:,}, or -1, not {shortened(value)}"
        )
    return max(0, value)


def _count(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    return _whole(field, config.get(field, default))


def _pair(config: Mapping[str, Any], field: str) -> tuple[int, int]:
    value = config[field]
    if not isinstance(value, list) or len(value) != 2:
        raise SpecError(f"{field} must be a list of two numbers, [outlier, main]")
    return _whole(field, value[0]), _whole(field, value[1])


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config[field]
    if not isinstance(value, bool):
        raise SpecError(f"{field} must be true or false, not {shortened(value)}")
    return value


def _norm_dim(config: Mapping[str, Any]) -> int:
    value = config.get("norm_dim", 0)
    if type(value) is not int or value not in (0, 1):
        raise SpecError(f"norm_dim must be 0 (by column) or 1 (by row), not {shortened(value)}")
    return value


def owners(name: str) -> Iterator[str]:
    """The modules that module `name` lies in, from the inside out."""
    while name := name.rpartition(".")[0]:
        yield name


def is_kept(name: str, kept: list[str]) -> bool:
    """Whether a name in `kept` is the module's, one that it lies in, or the last of its parts."""
    return any(f".{name}.".startswith(f".{k}.") or f".{name}".endswith(f".{k}") for k in kept)
