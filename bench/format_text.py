"""A format in a few words: what it has of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqkernels.spec import CodebookSpec, min_bits

__all__ = ["changed_fields", "told"]


def changed_fields(spec: CodebookSpec) -> dict[str, Any]:
    """Fields of a spec that differ from their defaults, as JSON has them."""
    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    defaults |= {"coefficients": [], "code_bits": [min_bits(entries) for entries in spec.stages]}
    return {name: value for name, value in spec.to_dict().items() if value != defaults[name]}


def told(fields: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return " ".join(f"{name}={_compact(value)}" for name, value in fields.items())


def _compact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ",".join(_compact(item) for item in value)
    return str(value)
