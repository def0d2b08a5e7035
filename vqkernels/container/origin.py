"""Where a container comes from, and how each of its matrices was made.

The `provenance` of a file is strings by name. Any name may be used; these mean the same in every
file:

    creator: the program that wrote the file, and its version; always there
    created: when, as ISO 8601 (`2026-11-22T09:39:30+00:00`, or the date alone)
    author: who
    source, source_sha256: what it was made from, and the SHA-256 of that: of several files, of what
        `sha256sum` prints of them in the order of their names
    format: name of the format that was asked for
    method, seed, iterations: of the quantizer, where it was asked the same for every matrix
    libraries: what computed it, as `library_stamp` gives it
    note: anything else

`made` is of one matrix. Any name (up to 64 printable characters, 32 names) may stand for a string
(up to 4096 characters), a number or a list of up to 16 numbers; numbers are finite, and whole ones
take 64 bits with their sign. These mean the same in every file:

    method: the quantizer (a string)
    seed, iterations: what it started from, and how long it ran (whole numbers)
    error: `sum (W - decoded W)^2 / sum W^2` (a number from 0 up)
    clip: the weights were limited to [low, high] before
    clip_percentiles: [low, high] of the weights, in percent (0 to 100), which gave `clip`
    calibration: what importance of errors was measured on (a string)
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

import vqkernels
from vqkernels.errors import ContainerError

__all__ = ["Made", "Value", "check_made", "checked_provenance", "frozen_made", "library_stamp"]

Value = str | int | float | list[float] | tuple[float, ...]
Made = Mapping[str, Value]

_MAX_NAMES = 32
_MAX_NAME = 64
_MAX_TEXT = 4096
_MAX_LIST = 16
_MAX_WHOLE = (1 << 63) - 1

_LIBRARIES = ("torch", "numpy", "safetensors")


def library_stamp() -> str:
    """The libraries that compute and store, with versions: `torch 2.13.0, numpy 2.4.6, ...`."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)


def checked_provenance(provenance: Mapping[str, str] | None) -> dict[str, str]:
    """`provenance` with its creator. Raises ContainerError for no text and for no date."""
    origin = {"creator": f"vqbench {vqkernels.__version__}", **(provenance or {})}
    if not all(isinstance(text, str) for item in origin.items() for text in item):
        raise ContainerError("provenance holds something else than strings; use str()")
    if (created := origin.get("created")) is not None:
        try:
            datetime.fromisoformat(created)
        except ValueError as error:
            raise ContainerError(
                f"provenance: created is {created!r}, no ISO 8601 date; "
                f"use datetime.now(UTC).isoformat()"
            ) from error
    return origin


def check_made(made: object) -> None:
    """Raise ContainerError, without a fix, unless `made` is as the module says."""
    if not isinstance(made, Mapping):
        raise ContainerError("made is no object")
    if len(made) > _MAX_NAMES:
        raise ContainerError(f"made has {len(made)} names, over {_MAX_NAMES}")
    for name, value in made.items():
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise ContainerError(f"made: {name!r} is no name of 1 to {_MAX_NAME} characters")
        if not _is_value(value):
            raise ContainerError(
                f"made: {name} is no string, finite number or list of up to {_MAX_LIST} of them"
            )
        if name in _KNOWN and not _KNOWN[name][0](value):
            raise ContainerError(f"made: {name} is {value!r}, not {_KNOWN[name][1]}")


def frozen_made(made: Made) -> Made:
    """`made` as nobody can change it, lists as tuples."""
    return MappingProxyType(
        {name: tuple(value) if isinstance(value, list) else value for name, value in made.items()}
    )


def _is_value(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_LIST and all(_is_number(number) for number in value)
    return _is_number(value)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_whole(value)


def _is_whole(value: object) -> bool:
    # True is an int to Python, and no number to us
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_WHOLE


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0


def _is_range(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and value[0] <= value[1]


def _is_percentiles(value: object) -> bool:
    return _is_range(value) and all(0 <= number <= 100 for number in value)  # type: ignore[attr-defined]  # a list, by now


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# What the values of well-known names are, once they are values at all.
_KNOWN: dict[str, tuple[Callable[[object], bool], str]] = {
    "method": (_is_text, "a string"),
    "seed": (_is_whole, "a whole number"),
    "iterations": (_is_whole, "a whole number"),
    "error": (_is_share, "a number from 0 up"),
    "clip": (_is_range, "[low, high]"),
    "clip_percentiles": (_is_percentiles, "[low, high] of 0 to 100"),
    "calibration": (_is_text, "a string"),
}
