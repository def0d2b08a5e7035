"""A tuned table: one device's measured choices of kernel and config, as one JSON file.

    {"schema": 1, "made_by": "vqbench 0.1.0",
     "device": {"kind", "name", "arch", "units"},
     "entries": [{"spec", "n", "k", "dtype", "m",
                  "chosen": {"kernel", "source", "config"}, "default": {the same},
                  "versions": {package or "driver": version},
                  "evidence": {"ratio", "low", "pairs", "made", "store", "subject"}}]}

An entry holds for one problem. One whose `chosen` is its `default` says that the default was
measured and stays. Nothing here is trusted: reading refuses whatever isn't exactly of this form,
and tuned_lookup holds what is left against the kernels and the machine.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib.metadata
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from vqkernels.device import Device
from vqkernels.errors import ContainerError, SpecError
from vqkernels.kernel import Kernel
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.spec import CodebookSpec

__all__ = ["SCHEMA", "Entry", "Evidence", "Pick", "Table", "TableDevice", "load", "stamp"]

SCHEMA = 1

_AGAIN = "export it again"

MOST_BYTES = 64 << 20  # an entry has about 2 KB: far more than any device was ever tuned for
MOST_TEXT = 1000  # characters of a name

Key = tuple[CodebookSpec, int, int, str]


@dataclasses.dataclass(frozen=True)
class TableDevice:
    """What a table is for. units: threads of a CPU, or multiprocessors."""

    kind: str
    name: str
    arch: str
    units: int

    @classmethod
    def of(cls, device: Device) -> TableDevice:
        """What of `device` a choice depends on."""
        return cls(device.kind, device.name, device.arch, device.units)

    @property
    def slug(self) -> str:
        """A file's name: letters, digits and single dashes; of a length that any disk takes."""
        text = re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.arch}".lower()).strip("-")
        return f"{text[:200]}-{self.units}"

    def __str__(self) -> str:
        what = "threads" if self.kind == "cpu" else "multiprocessors"
        return f"{self.name} {self.arch}, {self.units} {what}"


@dataclasses.dataclass(frozen=True)
class Pick:
    """A kernel by id, the hash of the source that was measured, and the config."""

    kernel: str
    source: str
    config: Config

    @classmethod
    def of(cls, kernel: Kernel, config: Config) -> Pick:
        """`kernel`, as it is now, in `config`."""
        return cls(kernel.id, kernel.source_hash, config)

    def __str__(self) -> str:
        values = " ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.kernel} {values}".rstrip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a choice rests on.

    ratio, low: the default's time over the best other's, and its one-sided lower bound; `pairs`
        of processes, 0 where nothing was held against the default.
    made: when, ISO 8601. store, subject: where the raw samples are.
    """

    ratio: float
    low: float
    pairs: int
    made: str
    store: str = ""
    subject: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What to use for one problem. versions: see `stamp`.

    Raises ValueError where something but the default is chosen without evidence that it is faster.
    """

    spec: CodebookSpec
    n: int
    k: int
    dtype: Dtype
    m: int
    chosen: Pick
    default: Pick
    versions: Mapping[str, str]
    evidence: Evidence

    def __post_init__(self) -> None:
        if not self.keeps_default and not (self.evidence.low > 1 and self.evidence.pairs > 1):
            raise ValueError(f"no evidence that {self.chosen} beats the default")

    @property
    def keeps_default(self) -> bool:
        """Whether the default was measured and stays."""
        return self.chosen == self.default

    @property
    def key(self) -> Key:
        """All of the problem but m, and a bias: n elements more don't change what is best."""
        return self.spec, self.n, self.k, self.dtype

    def __str__(self) -> str:
        found = self.evidence
        ratio, made = f"{found.ratio:.3g}x", found.made[:10]
        rest = f"(>= {found.low:.3g}), {found.pairs} pairs, {made}"
        if not self.keeps_default:
            return f"{ratio} the default {self.default} {rest}"
        if found.pairs:
            return f"the default stays: the best other one is {ratio} {rest}"
        return f"the default stays: nothing was confirmed to be faster, {made}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, as a table has them."""
        return {
            **{name: getattr(self, name) for name in ("n", "k", "dtype", "m")},
            "spec": self.spec.to_dict(),
            "chosen": _pick_fields(self.chosen),
            "default": _pick_fields(self.default),
            "versions": dict(self.versions),
            "evidence": dataclasses.asdict(self.evidence),
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """A device's entries."""

    device: TableDevice
    entries: tuple[Entry, ...]

    @functools.cached_property
    def _by_key(self) -> dict[Key, list[Entry]]:
        found: dict[Key, list[Entry]] = {}
        for entry in sorted(self.entries, key=lambda one: one.m):
            found.setdefault(entry.key, []).append(entry)
        return found

    def around(self, problem: Problem) -> tuple[Entry, ...] | str:
        """The entry of `problem`, or of the measured m below and above; none, or why they don't do.

        Two neighbours answer only if they agree: on one kernel and config, or on the default.
        """
        key = (problem.spec, problem.n, problem.k, problem.dtype)
        entries = self._by_key.get(key, [])
        if not entries:
            return ()
        at = bisect.bisect_left(entries, problem.m, key=lambda one: one.m)
        if at < len(entries) and entries[at].m == problem.m:
            return (entries[at],)
        if at in (0, len(entries)):
            span = f"{entries[0].m} to {entries[-1].m}"
            return f"m={problem.m} lies outside what was measured ({span})"
        below, above = entries[at - 1], entries[at]
        kept = below.keeps_default and above.keeps_default
        if below.chosen != above.chosen and not kept:
            return f"m={problem.m} lies between {below.m} and {above.m}, which chose differently"
        return below, above

    def to_dict(self, made_by: str) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` is the inverse. made_by: for people, never read."""
        return {
            "schema": SCHEMA,
            "made_by": made_by,
            "device": dataclasses.asdict(self.device),
            "entries": [entry.to_dict() for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, content: object) -> Table:
        """A table from `to_dict`'s output. Raises ContainerError for anything else."""
        schema = content.get("schema") if isinstance(content, dict) else None
        if type(schema) is int and schema != SCHEMA:
            raise ContainerError(f"has schema {schema}, this version reads {SCHEMA}; {_AGAIN}")
        fields = _fields(content, _TABLE, "the table")
        device = TableDevice(**_fields(fields["device"], _DEVICE, "device"))
        specs: dict[str, CodebookSpec] = {}
        entries = []
        for number, one in enumerate(fields["entries"]):
            try:
                entries.append(_entry(one, specs))
            except ContainerError as error:
                raise ContainerError(f"entry {number}: {error}; {_AGAIN}") from error
        if len({(*entry.key, entry.m) for entry in entries}) < len(entries):
            raise ContainerError(f"has two entries for one problem; {_AGAIN}")
        return cls(device, tuple(entries))


def load(path: Path) -> Table:
    """The table in `path`. Raises ContainerError, one line, for whatever else is there."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ContainerError("is no file; give one that `vqbench export` wrote")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ContainerError(f"has {size:,} bytes, more than any table")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets in brackets
        reason = getattr(error, "strerror", None) or "isn't JSON"
        raise ContainerError(f"{reason}; {_AGAIN}") from error
    return Table.from_dict(content)


def stamp(kernels: tuple[Kernel, ...], device: Device) -> dict[str, str]:
    """Versions of what makes the code of `kernels`: libraries, compilers, a GPU's driver.

    A kernel of another distribution answers for its own by its source hash.
    """
    names = {"torch"}
    for kernel in kernels:
        names.update(_COMPILERS.get(kernel.backend, ()))
    versions = {name: _version(name) for name in sorted(names)}
    if device.kind == "cuda":
        versions["driver"] = device.driver or "unknown"
    return versions


_COMPILERS = {
    "numba": ("numba", "llvmlite"),
    "triton": ("triton",),
    "cuda": ("cuda-core", "nvidia-cuda-nvrtc"),
}


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# ------------------------------------------------------------------------------------------------
# parsing

_TABLE = {"schema": int, "made_by": str, "device": dict, "entries": list}
_DEVICE = {"kind": str, "name": str, "arch": str, "units": int}
_ENTRY = {
    "spec": dict,
    "n": int,
    "k": int,
    "dtype": str,
    "m": int,
    "chosen": dict,
    "default": dict,
    "versions": dict,
    "evidence": dict,
}
_PICK = {"kernel": str, "source": str, "config": dict}
_EVIDENCE = {
    "ratio": float,
    "low": float,
    "pairs": int,
    "made": str,
    "store": str,
    "subject": str,
}


def _entry(content: object, specs: dict[str, CodebookSpec]) -> Entry:
    """specs: those met so far, by their JSON; a table has thousands of entries on a few."""
    fields = _fields(content, _ENTRY, "an entry")
    if fields["dtype"] not in get_args(Dtype) or min(fields["n"], fields["k"], fields["m"]) < 1:
        raise ContainerError("the problem is none: sizes are 1 or more, dtypes those of x")
    text = json.dumps(fields["spec"], sort_keys=True)
    if text not in specs:
        specs[text] = _spec(fields["spec"])
    fields["spec"] = specs[text]
    for name in ("chosen", "default"):
        fields[name] = _pick(fields[name], name)
    fields["evidence"] = _evidence(fields["evidence"])
    for name, version in fields["versions"].items():
        _check_text(name, "versions")
        _check_text(version, f"versions: {name}")
    try:
        return Entry(**fields)
    except ValueError as error:
        raise ContainerError(str(error)) from error


def _spec(fields: dict[str, Any]) -> CodebookSpec:
    try:
        return CodebookSpec.from_dict(fields)
    except (SpecError, TypeError, ArithmeticError) as error:
        raise ContainerError(str(error)) from error


def _pick(content: object, where: str) -> Pick:
    fields = _fields(content, _PICK, where)
    for name, value in fields["config"].items():
        _check_text(name, f"{where}: config")
        if type(value) is str:
            _check_text(value, f"{where}: {name}")
        elif type(value) not in (int, bool):
            raise ContainerError(f"{where}: {name} must be a number, a text or true or false")
    try:
        config = Config(**fields["config"])
    except TypeError as error:  # a parameter called `self`
        raise ContainerError(f"{where}: config has a name that no parameter can have") from error
    return Pick(fields["kernel"], fields["source"], config)


def _pick_fields(pick: Pick) -> dict[str, Any]:
    return {"kernel": pick.kernel, "source": pick.source, "config": dict(pick.config)}


def _evidence(content: object) -> Evidence:
    fields = _fields(content, _EVIDENCE, "evidence")
    # also false for NaN; a whole number of JSON may be too large for a float
    if not all(0 < fields[name] < 1e9 for name in ("ratio", "low")):
        raise ContainerError("evidence: ratio and low must be between 0 and 1e9")
    try:
        zone = datetime.fromisoformat(fields["made"]).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise ContainerError("evidence: made must be a date with a zone, ISO 8601")
    return Evidence(**fields)


def _fields(content: object, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """`content` if it is an object of exactly these fields."""
    if not isinstance(content, dict) or set(content) != set(kinds):
        raise ContainerError(f"{where} must have the fields {', '.join(kinds)}, and no others")
    for name, kind in kinds.items():
        value = content[name]
        # `type`, not isinstance: True is an int to Python
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ContainerError(f"{where}: {name} must be of type {kind.__name__}")
        if kind is str and value:
            _check_text(value, f"{where}: {name}")
    return dict(content)


def _check_text(value: object, where: str) -> None:
    """Names end in messages on a terminal: of sane length, without escape sequences."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > MOST_TEXT:
        raise ContainerError(f"{where} must be up to {MOST_TEXT} printable characters")
