"""Formats by name: the presets of the field, a small grammar, and TOML files of one's own."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from vqkernels.errors import SpecError
from vqkernels.spec import CodebookSpec, min_bits

__all__ = ["PRESETS", "parse_format"]

PQ_BLOCK = 128  # 8 subspaces of 16 with 256 fp16 entries: 64 KB of codebooks


def _vq(entries: int, length: int, **fields: object) -> CodebookSpec:
    return CodebookSpec.from_dict({"stages": [entries], "vector_length": length, **fields})


def _pq(subspaces: int, **fields: object) -> CodebookSpec:
    if subspaces < 1 or PQ_BLOCK % subspaces:
        raise SpecError(f"format: {subspaces} subspaces don't divide a block of {PQ_BLOCK}")
    return _vq(256, PQ_BLOCK // subspaces, subspaces=subspaces, **{"method": "pq", **fields})


def _rq(stages: int, entries: int, length: int) -> CodebookSpec:
    return CodebookSpec(method="rq", stages=(entries,) * stages, vector_length=length)


def _aqlm(stages: int, bits: int, width: int = 1, length: int = 8) -> CodebookSpec:
    return CodebookSpec(
        method="additive",
        stages=(1 << bits,) * stages,
        vector_length=length,
        vector_width=width,
        scale_axis="row",
    )


def _vptq(main: int, residual: int) -> CodebookSpec:
    stages = (main, residual) if residual else (main,)
    return CodebookSpec(method="vptq", stages=stages, vector_length=8, vector_axis="out")


PRESETS = MappingProxyType(
    {
        "vq-256x8": _vq(256, 8),
        "vq-256x16": _vq(256, 16),
        "vq-256x32": _vq(256, 32),
        "vq-256x8-channel": _vq(256, 8, group_axis="row", group_size=1),
        "pq-m4": _pq(4),
        "pq-m8": _pq(8),
        "pq-m16": _pq(16),
        "opq-m8": _pq(8, method="opq", rotation_size=PQ_BLOCK),
        "rq-2x256x8": _rq(2, 256, 8),
        "rq-3x256x8": _rq(3, 256, 8),
        "rq-4x256x8": _rq(4, 256, 8),
        "aqlm-1x16": _aqlm(1, 16),
        "aqlm-2x8": _aqlm(2, 8),
        "vptq-65536-256": _vptq(65536, 256),
        "toy-16-4": _vptq(16, 4),
    }
)

# Each pattern makes the formats beside it for any sizes; a preset is one that has a name.
_GRAMMAR = (
    (r"vq-(\d{1,6})x(\d{1,6})", _vq),
    (r"pq-m(\d{1,6})", _pq),
    (r"rq-(\d{1,2})x(\d{1,6})x(\d{1,6})", _rq),
    (r"aqlm-(\d{1,2})x(\d{1,2})", _aqlm),
    (r"aqlm-(\d{1,2})x(\d{1,2})-g(\d{1,6})x(\d{1,6})", _aqlm),
    (r"vptq-(\d{1,6})-(\d{1,6})", _vptq),
)


def parse_format(text: str) -> CodebookSpec:
    """The spec that `text` names: a preset, a sized name or the path of a TOML file.

    Sized names: `vq-ENTRIESxLENGTH`, `pq-mSUBSPACES`, `rq-STAGESxENTRIESxLENGTH`,
    `aqlm-STAGESxBITS`, `aqlm-STAGESxBITS-gWIDTHxLENGTH` (vectors of WIDTH rows), and
    `vptq-MAIN-RESIDUAL`. Fields of CodebookSpec may follow either name, as
    `rq-2x256x8,scale_axis=row,permuted=true`; a list's numbers are joined by `+`. All of it but a
    path is letters, digits and `-_.,=+`, so that it can be part of a file name.

    Raises SpecError for anything else.
    """
    if text.endswith(".toml"):
        return _from_file(Path(text))
    name, *settings = text.split(",")
    spec = _named(name, text)
    return _with_fields(spec, settings, text) if settings else spec


def _named(name: str, text: str) -> CodebookSpec:
    """The preset or the sized format called `name`, the start of `text`."""
    if name in PRESETS:
        return PRESETS[name]
    for pattern, build in _GRAMMAR:
        if match := re.fullmatch(pattern, name, re.ASCII):
            return build(*(int(group) for group in match.groups()))
    if name.endswith(".toml"):
        raise SpecError(f"format {text!r}: fields of a .toml file are set in the file itself")
    raise SpecError(
        f"format {text!r} is unknown; use one of {', '.join(PRESETS)}, a sized name such as "
        f"vq-512x8 or rq-2x128x16, or the path of a .toml file with the fields of CodebookSpec"
    )


def _with_fields(spec: CodebookSpec, settings: list[str], text: str) -> CodebookSpec:
    """`spec` with fields as `settings`, `field=value` each, say; an error names the `text`."""
    fields, hints = dict[str, Any](), get_type_hints(CodebookSpec)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not value:
            raise SpecError(
                f"format {text!r}: {setting!r} sets no field; write name=value, such as "
                f"scale_axis=row, without spaces"
            )
        if name in fields:
            raise SpecError(f"format {text!r}: {name} is set twice; leave one out")
        # an unknown field is the spec's to name
        fields[name] = _value(value, hints.get(name)) if name in hints else value
    before = spec.to_dict()
    if spec.code_bits == tuple(min_bits(entries) for entries in spec.stages):
        del before["code_bits"]  # they follow from the stages, which may be others now
    try:
        return CodebookSpec.from_dict(before | fields)
    except SpecError as error:
        raise SpecError(f"format {text!r}: {str(error).removeprefix('format: ')}") from error


def _value(text: str, hint: object) -> object:
    """`text` as a field of type `hint` has it; as it is where it can't be: the spec says why."""
    if hint is bool:
        return {"true": True, "false": False}.get(text, text)
    if hint is int:
        return _whole(text)
    if hint == tuple[int, ...]:
        return [_whole(part) for part in text.split("+")]
    if hint == tuple[float, ...]:
        return [_decimal(part) for part in text.split("+")]
    return text


# int() and float() take more: spaces, underscores, digits of other scripts, nan, any length.


def _whole(text: str) -> object:
    return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else text


def _decimal(text: str) -> object:
    return float(text) if re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", text, re.ASCII) else text


def _from_file(path: Path) -> CodebookSpec:
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"format file {path}: {error}; give a readable TOML file") from error
    try:
        return CodebookSpec.from_dict(fields)
    except SpecError as error:
        raise SpecError(f"format file {path}: {error}") from error
