"""What a selfcheck found and the gate reads: how far a case differs from itself on this machine.

    {"schema": 1, "made_by": "vqbench 0.1.0",
     "machine": {"kind", "name", "arch", "units", "driver", "power_limit_w"},
     "cases": {name: {"workload", "layer", "format", "m", "dtype", "kernel", "comparisons",
                      "rms_log_ratio", "pair_spread", "effects": {"0.05": {"REGRESSED": 40}},
                      "versions": {package: version}, "made"}},
     "summary": [{"effect", "comparisons", shares of verdicts with intervals}]}

One file a machine, and another driver or power limit makes another machine: noise measured
elsewhere says nothing here. `summary` follows from the cases and is never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import vqkernels
from autotune.verdict import Comparison, Verdict
from bench.environment import device_state
from bench.gate.shares import shares
from vqkernels.atomic import locked, write_atomically
from vqkernels.device import Device
from vqkernels.errors import ContainerError
from vqkernels.tuned_table import TableDevice

__all__ = ["SCHEMA", "CaseNoise", "Machine", "Noise", "load", "measured", "merge", "place", "save"]

SCHEMA = 1

MOST_BYTES = 64 << 20  # a case has about 1 KB
_AGAIN = "move it away and run `vqbench selfcheck` again"

_FILE = {"schema": int, "made_by": str, "machine": dict, "cases": dict, "summary": list}
_MACHINE = {
    **dict.fromkeys(("kind", "name", "arch"), str),
    "units": int,
    "driver": str | None,
    "power_limit_w": int | None,
}
_CASE = {
    **dict.fromkeys(("workload", "layer", "format", "dtype", "kernel", "made"), str),
    **dict.fromkeys(("m", "comparisons"), int),
    **dict.fromkeys(("rms_log_ratio", "pair_spread"), int | float),
    **dict.fromkeys(("effects", "versions"), dict),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What noise depends on. driver, power_limit_w: of a GPU; None where nobody told."""

    kind: str
    name: str
    arch: str
    units: int
    driver: str | None = None
    power_limit_w: int | None = None

    @classmethod
    def of(cls, device: Device) -> Machine:
        """`device` as it is set up now."""
        facts = dataclasses.asdict(TableDevice.of(device))
        limit = device_state(device).get("power_limit_w") if device.kind == "cuda" else None
        return cls(
            **facts, driver=device.driver, power_limit_w=None if limit is None else round(limit)
        )

    @property
    def file_name(self) -> str:
        """A name of its own for each machine."""
        facts = json.dumps(dataclasses.asdict(self), sort_keys=True)
        device = TableDevice(self.kind, self.name, self.arch, self.units)
        return f"{device.slug}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.json"

    def __str__(self) -> str:
        device = TableDevice(self.kind, self.name, self.arch, self.units)
        driver = f", driver {self.driver}" if self.driver else ""
        limit = f", {self.power_limit_w} W" if self.power_limit_w else ""
        return f"{device}{driver}{limit}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseNoise:
    """One case of a selfcheck.

    comparisons: of A against A. rms_log_ratio: root mean square of the logs of their median ratios.
    pair_spread: standard deviation of a pair's log-ratio within a comparison. effects: by slowdown
    (`"0.0"`, `"0.05"`) how many comparisons got each verdict. versions: of what was measured.
    """

    workload: str
    layer: str
    format: str
    m: int
    dtype: str
    kernel: str
    comparisons: int
    rms_log_ratio: float
    pair_spread: float
    effects: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    made: str


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is known of a machine, by the case's name (`bench.gate.outcome.Outcome.name`)."""

    machine: Machine
    cases: Mapping[str, CaseNoise]

    def floor(self, name: str) -> float:
        """The ratio by which a case differs from itself; 1 where that wasn't measured."""
        return math.exp(self.cases[name].rms_log_ratio) if name in self.cases else 1.0

    def spread(self, name: str) -> float | None:
        """Standard deviation of a pair's log-ratio; None where that wasn't measured."""
        return self.cases[name].pair_spread if name in self.cases else None

    def summary(self) -> list[dict[str, Any]]:
        """A row for each slowdown, over all cases: JSON-ready, see `shares`."""
        verdicts: dict[float, Counter[str]] = {}
        for case in self.cases.values():
            for effect, counts in case.effects.items():
                verdicts.setdefault(float(effect), Counter()).update(counts)
        return [
            {"effect": effect, "comparisons": counts.total(), **shares(counts)}
            for effect, counts in sorted(verdicts.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, as a file has them."""
        return {
            "schema": SCHEMA,
            "made_by": f"vqbench {vqkernels.__version__}",
            "machine": dataclasses.asdict(self.machine),
            "cases": {name: dataclasses.asdict(case) for name, case in self.cases.items()},
            "summary": self.summary(),
        }


def measured(
    same: Sequence[Comparison], effects: Mapping[float, Mapping[str, int]], **case: Any
) -> CaseNoise:
    """What comparisons of A against A say of a case.

    effects: by slowdown, 0 among them, how often each verdict was given. case: the other fields of
    CaseNoise, without `made`.
    """
    medians = [statistics.median(one.logs) for one in same]
    return CaseNoise(
        comparisons=len(same),
        rms_log_ratio=math.sqrt(statistics.fmean(log**2 for log in medians)),
        pair_spread=math.sqrt(statistics.fmean(statistics.variance(one.logs) for one in same)),
        effects={str(float(effect)): dict(counts) for effect, counts in effects.items()},
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        **case,
    )


def place(path: Path | None, machine: Machine) -> Path:
    """The file of a machine: `path`, VQBENCH_NOISE, or `noise` in the user's data folder.

    Each is a folder with a file for every machine, or ends in `.json` and is the file.
    """
    if path is None and (chosen := os.environ.get("VQBENCH_NOISE")):
        path = Path(chosen)
    if path is None:
        base = os.environ.get("XDG_DATA_HOME")
        data = Path(base) if base else Path.home() / ".local" / "share"
        path = data / "vqbench" / "noise"
    return path if path.suffix == ".json" else path / machine.file_name


def load(path: Path | None, device: Device) -> Noise | None:
    """What is stored of `device`, see `place`; None where nothing is.

    Raises ContainerError where the file is damaged or another machine's.
    """
    machine = Machine.of(device)
    file = place(path, machine)
    return _load(file, machine) if _exists(file) else None


def merge(old: Noise, new: Noise) -> Noise:
    """`new` and those cases of `old` that it hasn't: a machine is as noisy as it was last seen."""
    return Noise(new.machine, dict(sorted({**old.cases, **new.cases}.items())))


def save(noise: Noise, path: Path | None = None) -> Path:
    """Add `noise` to what is stored of its machine; returns the file.

    Two processes that save at a time lose nothing. Raises ContainerError where what is there is
    damaged or another machine's, or it can't be written.
    """
    file = place(path, noise.machine)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ContainerError(f"{file}: {error.strerror}; choose another folder") from error
    with locked(file):
        if _exists(file):
            noise = merge(_load(file, noise.machine), noise)
        text = json.dumps(noise.to_dict(), indent=1, allow_nan=False)
        write_atomically(file, [text.encode() + b"\n"])
    return file


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as error:
        raise ContainerError(
            f"{file}: {error.strerror}; choose a folder that you may read"
        ) from error


def _load(file: Path, machine: Machine) -> Noise:
    try:
        found = _parsed(_content(file))
    except ContainerError as error:
        raise ContainerError(f"{file}: {error}; {_AGAIN}") from error
    if found.machine != machine:
        raise ContainerError(
            f"{file}: was measured on {found.machine}, this is {machine}; name another file"
        )
    return found


def _content(file: Path) -> object:
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ContainerError("is no file")
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ContainerError(f"has {size:,} bytes, more than any selfcheck writes")
        content: object = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets in brackets
        raise ContainerError(getattr(error, "strerror", None) or "isn't JSON") from error
    return content


def _parsed(content: object) -> Noise:
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is int and schema != SCHEMA:
        raise ContainerError(f"has schema {schema}, this version reads {SCHEMA}")
    fields = _fields(content, _FILE, "the file")
    machine = Machine(**_fields(fields["machine"], _MACHINE, "machine"))
    return Noise(machine, {name: _case(case, name) for name, case in fields["cases"].items()})


def _case(content: object, name: str) -> CaseNoise:
    what = f"case {name[:100]!r}"
    fields = _fields(content, _CASE, what)
    if fields["m"] < 1 or fields["comparisons"] < 1:
        raise ContainerError(f"{what}: m and comparisons are at least 1")
    _fields(fields["versions"], dict.fromkeys(fields["versions"], str), f"{what}: versions")
    for effect, counts in fields["effects"].items():
        try:
            slowdown = float(effect)
        except ValueError:
            slowdown = math.nan
        if not math.isfinite(slowdown) or not isinstance(counts, dict):
            raise ContainerError(f"{what}: has an effect {effect[:50]!r}")
        known = {verdict: int for verdict in get_args(Verdict) if verdict in counts}
        _fields(counts, known, f"{what}: effect {effect}")
    return CaseNoise(**fields)


def _fields(content: object, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`content` as a dict of just these fields, numbers finite and not negative."""
    if not isinstance(content, dict) or content.keys() != kinds.keys():
        raise ContainerError(f"{what}: has other fields than {', '.join(kinds) or 'none'}")
    for name, kind in kinds.items():
        value = content[name]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (isinstance(value, int | float) and not 0 <= value < math.inf):
            raise ContainerError(f"{what}: {name} can't be {str(value)[:50]!r}")
    return content
