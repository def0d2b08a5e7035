"""Where tuned tables are looked for, and whether what they say may be believed here.

In this order; the first with an answer for the problem serves it:

    explicit      what `vqkernels.use_tables` was given, a file or a folder
    environment   VQBENCH_TUNED, a file or a folder
    user          $XDG_CONFIG_HOME/vqbench/tuned/*.json (~/.config where that is unset)
    package       vqkernels/tuned/*.json, what comes with this version

The word `off` for one of the first two: no table at all. Tables are read once; `use_tables` has
them read again.

An entry serves only where nothing has changed since it was measured: device, sources of its kernel
and of the default that it was held against, versions of their compilers, the driver, and which
kernel and config is the default. Anything else is passed over with a TunedTableWarning, once a
table and kind of reason: never an exception.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from vqkernels.device import Device
from vqkernels.errors import ConfigError, ContainerError
from vqkernels.kernel import Kernel, Registry
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tuned_table import Entry, Pick, Table, TableDevice, load, stamp

__all__ = [
    "OFF",
    "PACKAGE",
    "Answer",
    "Finding",
    "TunedTableWarning",
    "find",
    "one_line",
    "places",
    "set_explicit",
    "user_folder",
    "warn_once",
]

OFF = "off"
PACKAGE = Path(__file__).parent / "tuned"

MOST_REASON = 400  # characters; a damaged file may have names of any length

Place = Literal["explicit", "environment", "user", "package"]
Default = Callable[[Problem], tuple[Kernel, Config]]
"""The kernel and config of a problem where no table serves it."""

# device: the table is for another one; state: for this one with other threads or instructions;
# none, gap: it has no entry for the format and shape, or none for this m; the others: a mismatch.
Kind = Literal[
    "served", "device", "state", "none", "gap",
    "damaged", "kernel", "source", "versions", "default", "config", "limit", "fails",
]  # fmt: skip


class TunedTableWarning(UserWarning):
    """A tuned table, or some of it, that is passed over."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a table said of a problem, or why it had nothing to say."""

    place: Place
    path: Path
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"tuned table {self.path}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A kernel and config from a table, or None; and a finding for each table that was asked.

    entries: what it rests on: the problem's own, or its neighbours in m.
    """

    choice: tuple[Kernel, Config] | None
    entries: tuple[Entry, ...]
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> str:
        """Why tables that have entries for the format and shape don't serve, in a line."""
        quiet = ("served", "device", "none")
        return "; ".join(str(one) for one in self.findings if one.kind not in quiet)


@dataclasses.dataclass
class _RefusalError(Exception):
    """A table that may not serve a problem here."""

    kind: Kind
    text: str


_explicit: str | Path | None = None
_told: set[tuple[Path, str]] = set()


def set_explicit(path: str | Path | None) -> None:
    """Look at `path` first (None: no longer), and read all tables again."""
    global _explicit
    _explicit = path
    _told.clear()
    _tables.cache_clear()


def user_folder() -> Path:
    """Where a user's tables are. Raises RuntimeError where a user has no home."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "vqbench" / "tuned"


def places() -> dict[Place, Path]:
    """Where tables are looked for now, in order; nowhere where they are off."""
    named: dict[Place, str | Path | None] = {
        "explicit": _explicit,
        "environment": os.environ.get("VQBENCH_TUNED"),
    }
    found: dict[Place, Path] = {}
    for place, path in named.items():
        if path == OFF:
            return found
        if path:
            found[place] = Path(path)
    with contextlib.suppress(RuntimeError):  # a container's user may have no home
        found["user"] = user_folder()
    return {**found, "package": PACKAGE}


def find(problem: Problem, device: Device, registry: Registry, default: Default) -> Answer:
    """What the first table that has an answer says of `problem`; warns of mismatches."""
    inspector = _Inspector(problem, device, registry, default)
    findings: list[Finding] = []
    for place, root in places().items():
        tables = _tables(place, root)
        fits = any(isinstance(one, Table) and one.device == inspector.here for _, one in tables)
        for path, table in tables:
            try:
                entries = inspector.entries(table)
                choice = inspector.choice(entries)
            except _RefusalError as refusal:
                text = refusal.text[:MOST_REASON]
                findings.append(Finding(place, path, refusal.kind, text))
                if _is_mismatch(refusal.kind, path == root, fits):
                    warn_once(path, refusal.kind, text)
                continue
            findings.append(Finding(place, path, "served", _told_of(entries)))
            return Answer(choice, entries, tuple(findings))
    return Answer(None, (), tuple(findings))


def warn_once(path: Path, kind: str, text: str) -> None:
    """Say that a table is passed over, once a table and kind of reason."""
    if (path, kind) not in _told:
        _told.add((path, kind))
        message = f"tuned table {path} is passed over: {text} (see `vqbench explain`)"
        warnings.warn(message, TunedTableWarning, stacklevel=2)


def one_line(error: Exception) -> str:
    """`Type: message` of any exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_mismatch(kind: Kind, named: bool, fits: bool) -> bool:
    """Whether a refusal is worth a word: a folder may hold the tables of many devices.

    named: the file itself was named. fits: another table of its folder is for this device.
    """
    if kind == "device":
        return named
    if kind == "state":
        return not fits
    return kind not in ("none", "gap")


def _told_of(entries: tuple[Entry, ...]) -> str:
    """What the entries say; of two neighbours, the one that is less sure."""
    text = str(min(entries, key=lambda entry: entry.evidence.low))
    return text if len(entries) == 1 else f"{text}, at m={entries[0].m} and m={entries[1].m} alike"


@functools.cache
def _tables(place: Place, root: Path) -> tuple[tuple[Path, Table | str], ...]:
    """The tables of a place, or what is wrong with them; a file that was named has to be there."""
    try:
        if root.is_dir():
            return tuple((path, _load(path)) for path in sorted(root.glob("*.json")))
    except OSError as error:
        return ((root, f"can't be read ({error.strerror})"),)
    return ((root, _load(root)),) if place in ("explicit", "environment") else ()


def _load(path: Path) -> Table | str:
    try:
        return load(path)
    except ContainerError as error:
        return str(error)


@dataclasses.dataclass(frozen=True)
class _Inspector:
    """Asks tables about one problem; each method raises _RefusalError."""

    problem: Problem
    device: Device
    registry: Registry
    default: Default

    @property
    def here(self) -> TableDevice:
        return TableDevice.of(self.device)

    def entries(self, table: Table | str) -> tuple[Entry, ...]:
        """The entries of `table` that concern the problem."""
        if isinstance(table, str):
            raise _RefusalError("damaged", table)
        there, here = table.device, self.here
        if there != here:
            same = (there.kind, there.name) == (here.kind, here.name)
            raise _RefusalError("state" if same else "device", f"for {there}; this is {here}")
        entries = table.around(self.problem)
        if isinstance(entries, str):
            raise _RefusalError("gap", entries)
        if not entries:
            raise _RefusalError("none", "no entry for this format, shape and dtype")
        return entries

    def choice(self, entries: tuple[Entry, ...]) -> tuple[Kernel, Config]:
        """The kernel and config that `entries` agree on, if they hold here and now."""
        try:
            for entry in entries:
                self._check(entry)
            if all(entry.keeps_default for entry in entries):
                return self.default(self.problem)
            kernel, config = self._kernel(entries[0].chosen), entries[0].chosen.config
            self._check_limits(kernel, config)
        except _RefusalError:
            raise
        except Exception as error:  # a kernel may be anyone's, a config anything
            raise _RefusalError("fails", one_line(error)) from error
        return kernel, config

    def _kernel(self, pick: Pick) -> Kernel:
        kernel = self.registry.kernels.get(pick.kernel)
        if kernel is None:
            reason = self.registry.missing.get(pick.kernel.replace("/", "."), "unknown here")
            raise _RefusalError("kernel", f"names {pick.kernel}, which can't be used: {reason}")
        if kernel.source_hash != pick.source:
            text = f"the source of {kernel.id} has changed since it was measured; tune again"
            raise _RefusalError("source", text)
        return kernel

    def _check(self, entry: Entry) -> None:
        """Raise where something has changed since `entry` was measured."""
        kernels = (self._kernel(entry.chosen), self._kernel(entry.default))
        now = stamp(kernels, self.device)
        for name in sorted({*now, *entry.versions}):
            was, there = entry.versions.get(name, "none"), now.get(name, "none")
            if was != there:
                raise _RefusalError("versions", f"{name} was {was}, now it is {there}; tune again")
        kernel, config = self.default(dataclasses.replace(self.problem, m=entry.m))
        if (kernel.id, config) != (entry.default.kernel, entry.default.config):
            now_default = Pick(kernel.id, "", config)
            text = f"held against {entry.default}, but the default is {now_default}; tune again"
            raise _RefusalError("default", text)

    def _check_limits(self, kernel: Kernel, config: Config) -> None:
        """Raise unless `config` is one of the kernel's, and runs the problem on this device."""
        try:
            kernel.space.check(config)
        except ConfigError as error:
            raise _RefusalError("config", f"{kernel.id}: {error}") from error
        for param in kernel.space.params:
            # True == 1 to Python, but not to a compiler
            if type(config[param.name]) not in {type(value) for value in param.values}:
                value = f"{param.name}={config[param.name]!r}"
                raise _RefusalError("config", f"{kernel.id}: config: {value} is of another type")
        if (reason := kernel.supports(self.problem, self.device)) is not None:
            raise _RefusalError("limit", f"{kernel.id} can't take the problem: {reason}")
        needs = kernel.footprint(config, self.problem, self.device).shared_bytes
        if self.device.shared_bytes is not None and needs > self.device.shared_bytes:
            has = f"{needs:,} bytes of shared memory, the device has {self.device.shared_bytes:,}"
            raise _RefusalError("limit", f"{kernel.id} needs {has}")
