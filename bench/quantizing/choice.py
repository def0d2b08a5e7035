"""Which tensors of a model are quantised, and in which format each."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

import torch

from vqkernels.container.manifest import check_name
from vqkernels.errors import ContainerError, TensorError
from vqkernels.formats import TensorFiles
from vqkernels.presets import parse_format
from vqkernels.spec import CodebookSpec

__all__ = ["Choice", "Formats", "bias_of", "check_weights", "choose"]

# Weights whose numbers are the weights; FP8 and integer ones need scales from elsewhere.
_DTYPES = ("F64", "F32", "F16", "BF16")

# Tables that are looked up, and gains: no matrix product, so nothing for our kernels.
_NOT_LINEAR = ("embed", "norm")


@dataclasses.dataclass(frozen=True)
class Formats:
    """The format of each tensor: `usual`, or that of the last of `others` whose glob matches."""

    usual: CodebookSpec
    others: tuple[tuple[str, CodebookSpec], ...] = ()

    @classmethod
    def parse(cls, usual: str, others: Sequence[str]) -> Formats:
        """From names: `others` as `GLOB=FORMAT`. Raises SpecError for what is no format."""
        pairs = [text.partition("=") for text in others]
        return cls(
            parse_format(usual),
            tuple((glob, parse_format(name)) for glob, _, name in pairs),
        )

    def of(self, name: str) -> CodebookSpec:
        """The format of tensor `name`."""
        fitting = [spec for glob, spec in self.others if fnmatch.fnmatchcase(name, glob)]
        return fitting[-1] if fitting else self.usual


@dataclasses.dataclass(frozen=True)
class Choice:
    """Tensors to quantise, each with its format and shape, and names of the others by why not."""

    formats: Mapping[str, CodebookSpec]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, Sequence[str]]


def choose(source: TensorFiles, formats: Formats, patterns: Sequence[str]) -> Choice:
    """Tensors to quantise: those that match one of `patterns`, or without any the linear layers.

    Raises ContainerError where there is none, and for a glob of `formats` that none matches.
    """
    chosen, skipped = dict[str, CodebookSpec](), dict[str, list[str]]()
    for name in source.keys():  # noqa: SIM118  # not a dict
        if patterns and not any(fnmatch.fnmatchcase(name, glob) for glob in patterns):
            continue
        spec = formats.of(name)
        reason = _unfit(source, name) or ("" if patterns else _unasked(source, name, spec))
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            chosen[name] = spec
    if not chosen:
        what = f"matches {' '.join(patterns)}" if patterns else "is the weight of a linear layer"
        reasons = "; ".join(f"{len(found)} {reason}" for reason, found in skipped.items())
        raise ContainerError(
            f"{source.path}: no tensor {what} ({reasons or 'nothing has that name'}); "
            f"name tensors with --layer"
        )
    _check_names(source, chosen, [glob for glob, _ in formats.others])
    return Choice(chosen, {name: source.shape(name) for name in chosen}, skipped)


def check_weights(source: TensorFiles, names: Sequence[str], *, bias: bool) -> None:
    """Raise TensorError for NaN and infinity: all layers first, as one may come after hours."""
    for name in names:
        for key in (name, bias_of(source, name) if bias else None):
            if key and not bool(torch.isfinite(source.read(key).float()).all()):
                raise TensorError(
                    f"{source.path}: tensor {key!r} holds NaN or infinity (as float32); repair "
                    f"the checkpoint, or leave the layer out with --layer"
                )


def bias_of(source: TensorFiles, name: str) -> str | None:
    """The vector that lies beside weight `name` in the checkpoint, if there is one of its rows."""
    prefix, dot, _ = name.rpartition(".")
    found = f"{prefix}{dot}bias"
    if found not in source or source.shape(found) != source.shape(name)[:1]:
        return None
    return found


def _check_names(source: TensorFiles, chosen: Mapping[str, object], globs: Sequence[str]) -> None:
    for name in chosen:
        try:
            check_name(name)
        except ContainerError as error:
            raise ContainerError(f"{source.path}: {error}") from error
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in chosen):
            raise ContainerError(
                f"{source.path}: --layer-format {glob!r} matches none of the {len(chosen)} tensors "
                f"to quantise ({', '.join(list(chosen)[:3])}, ...); correct the glob"
            )


def _unfit(source: TensorFiles, name: str) -> str:
    """Why a tensor is no matrix that can be quantised, or nothing."""
    if len(source.shape(name)) != 2:
        return "not a matrix"
    if source.dtype_name(name) not in _DTYPES:
        return f"of dtype {source.dtype_name(name)}, not {', '.join(_DTYPES)}"
    return ""


def _unasked(source: TensorFiles, name: str, spec: CodebookSpec) -> str:
    """Why a matrix isn't taken unless it is asked for by name, or nothing."""
    if name.rpartition(".")[2] != "weight":
        return "not called *.weight"
    if word := next((word for word in _NOT_LINEAR if word in name.lower()), None):
        return f"with {word!r} in the name"
    if min(source.shape(name)) < spec.vector_length:
        return f"smaller than a vector of {spec.vector_length}"
    return ""
