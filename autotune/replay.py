"""Recorded spaces: others' measurements replayed without a GPU, and ours written for others.

Two formats. Kernel Tuner's cache: `tune_params`, and for each config its values and its time in
milliseconds, or the name of a failure (van Werkhoven 2019). And the auto-tuning community's T4
results: a list of evaluations with their validity and measurements.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.candidates import Candidates, from_configs
from autotune.measurement import Measurement, Status
from autotune.strategies import Outcome, Strategy
from vqkernels.atomic import write_atomically
from vqkernels.errors import ConfigError, ContainerError
from vqkernels.space import Config, Param, Space, Value

__all__ = [
    "Recorded",
    "Tried",
    "load_cache",
    "load_results",
    "replay",
    "save_cache",
    "save_metadata",
    "save_results",
]

_SCHEMA = "1.0.0"
_MS = 1e-3
_UNITS = {"": _MS, "s": 1.0, "seconds": 1.0, "ms": _MS, "us": 1e-6, "ns": 1e-9}

# Kernel Tuner's failures. It has one name for what ran and went wrong; ours stands beside it.
_CACHE_NAMES: Mapping[Status, str] = {
    "constraint": "InvalidConfig",
    "compile": "CompilationFailedConfig",
    "runtime": "RuntimeFailedConfig",
    "incorrect": "RuntimeFailedConfig",
    "timeout": "RuntimeFailedConfig",
}
_CACHE_STATUS = {"InvalidConfig": "constraint", "CompilationFailedConfig": "compile"}
_VALIDITY: Mapping[Status, str] = {
    "ok": "correct",
    "constraint": "constraints",
    "compile": "compile",
    "runtime": "runtime",
    "incorrect": "correctness",
    "timeout": "timeout",
}
# What early versions wrote as the time of a failure, 1e20 ms, and anything as absurd.
_FAILED = 1e16


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A space that was measured before: each candidate's time and status, in order.

    seconds: infinity where there is no time.
    """

    name: str
    device: str
    candidates: Candidates
    seconds: NDArray[np.float64]
    statuses: tuple[str, ...]

    def outcome(self, config: Config) -> Outcome:
        """What became of `config` then. Raises ConfigError where it was not recorded."""
        at = self.candidates.index(config)
        seconds = float(self.seconds[at])
        return Outcome(config, seconds if math.isfinite(seconds) else None, self.statuses[at])


@dataclasses.dataclass(frozen=True)
class Tried:
    """An attempt, as the formats here store it. time: of day, ISO 8601."""

    config: Config
    measurement: Measurement
    time: str = ""


def replay(
    strategy: Strategy, recorded: Recorded, *, seed: int, budget: int, batch: int = 1
) -> NDArray[np.float64]:
    """The fraction of the optimum after each config that `strategy` asks for, up to `budget`.

    0 while nothing usable was found; failures count as asked for. The trace ends early where the
    space does. Raises ConfigError where a config is asked for twice or wasn't recorded.
    """
    search = strategy.search(recorded.candidates, np.random.default_rng(seed), batch=batch)
    optimum, best = float(recorded.seconds.min()), math.inf
    seen: set[Config] = set()
    trace: list[float] = []
    asked = next(search, None)
    while asked is not None and len(trace) < budget:
        outcomes = [recorded.outcome(config) for config in asked]
        for outcome in outcomes:
            if outcome.config in seen:
                raise ConfigError(f"{strategy.name}: {outcome.config} is asked for twice")
            seen.add(outcome.config)
            best = min(best, math.inf if outcome.seconds is None else outcome.seconds)
            trace.append(optimum / best if math.isfinite(best) else 0.0)
        try:
            asked = search.send(outcomes)
        except StopIteration:
            asked = None
    return np.array(trace[:budget])


def load_cache(path: Path) -> Recorded:
    """Read a Kernel Tuner cache, `.json` or `.json.gz`; one that was cut short counts as ended.

    Raises ContainerError where it is no cache, or a config doesn't fit its parameters.
    """
    whole = _load(path)
    try:
        names = list(whole["tune_params_keys"])
        params = tuple(Param(n, tuple(map(_value, whole["tune_params"][n])), "") for n in names)
        entries = list(whole["cache"].values())
        configs = [Config(**{name: _value(entry[name]) for name in names}) for entry in entries]
        objective = whole.get("objective", "time")
        outcomes = [_cached(entry, objective) for entry in entries]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ContainerError(
            f"{path}: is no Kernel Tuner cache ({error!r}); give one with tune_params and cache"
        ) from error
    return _recorded(
        path, str(whole.get("kernel_name", "")), str(whole.get("device_name", "")), params,
        configs, outcomes,
    )  # fmt: skip


def _cached(entry: Mapping[str, Any], objective: str) -> tuple[float, str]:
    value = entry[objective]
    if isinstance(value, str):
        return math.inf, str(entry.get("status", _CACHE_STATUS.get(value, "runtime")))
    return _usable(float(value) * _MS)


def _usable(seconds: float) -> tuple[float, str]:
    """A time, unless it is one that stands for a failure: NaN too."""
    return (seconds, "ok") if 0 < seconds < _FAILED else (math.inf, "runtime")


def save_cache(
    path: Path, space: Space, tried: Iterable[Tried], *, kernel: str, device: str, problem: Any
) -> None:
    """Write attempts as a Kernel Tuner cache, which its simulation mode and others' tools read.

    `checked` attempts have neither a time nor a failure and are left out. Of a config that was
    tried twice the last attempt stays. problem: sizes, as JSON.
    """
    names = [param.name for param in space.params]
    cache = {}
    for one in tried:
        if one.measurement.status != "checked":
            space.check(one.config)
            key = ",".join(str(one.config[name]) for name in names)
            cache[key] = {name: one.config[name] for name in names} | _entry(one)
    whole = {
        "device_name": device,
        "kernel_name": kernel,
        "problem_size": problem,
        "tune_params_keys": names,
        "tune_params": {param.name: list(param.values) for param in space.params},
        "objective": "time",
        "cache": cache,
    }
    # A line break before the last brace: readers of the format look for it to see that it is whole.
    text = json.dumps(whole, allow_nan=False)
    _store(path, text[:-1] + "\n}")


def _entry(one: Tried) -> dict[str, Any]:
    measured = one.measurement
    if measured.status == "ok":
        told: dict[str, Any] = {
            "time": measured.median_s / _MS,
            "times": [sample / _MS for sample in measured.samples_s],
        }
    else:
        told = {"time": _CACHE_NAMES[measured.status], "status": measured.status}
        told["reason"] = measured.reason
    return told | {
        "compile_time": (measured.compile_s or 0.0) / _MS,
        "verification_time": 0,
        "benchmark_time": sum(measured.samples_s) / _MS,
        "strategy_time": 0,
        "framework_time": 0,
        "timestamp": one.time,
    }


def save_results(path: Path, tried: Iterable[Tried]) -> None:
    """Write attempts as T4 results; `checked` ones are left out, as from a cache."""
    results = [_evaluation(one) for one in tried if one.measurement.status != "checked"]
    whole = {
        "schema_version": _SCHEMA,
        "results": results,
        "metadata": {"timeunit": "milliseconds"},
    }
    _store(path, json.dumps(whole, allow_nan=False))


def _evaluation(one: Tried) -> dict[str, Any]:
    measured = one.measurement
    timed = measured.status == "ok"
    return {
        "timestamp": one.time,
        "configuration": dict(one.config),
        "times": {
            "compilation_time": (measured.compile_s or 0.0) / _MS,
            "runtimes": [sample / _MS for sample in measured.samples_s],
            "framework": 0,
            "search_algorithm": 0,
            "validation": 0,
        },
        "invalidity": _VALIDITY[measured.status],
        "correctness": 0 if measured.status == "incorrect" else 1,
        "measurements": [{"name": "time", "value": measured.median_s / _MS, "unit": "ms"}]
        if timed
        else [],
        "objectives": ["time"],
    }


def save_metadata(
    path: Path, hardware: Sequence[Mapping[str, Any]], system: str, requirements: Sequence[str]
) -> None:
    """Write the T4 metadata that goes with results: machine, operating system, packages."""
    whole = {
        "schema_version": _SCHEMA,
        "metadata": {
            "hardware": {
                "hardware_description": [dict(part) for part in hardware],
                "operating_system": system,
            },
            "environment": {"device_query": {}, "requirements": list(requirements)},
        },
    }
    _store(path, json.dumps(whole, allow_nan=False))


def load_results(path: Path) -> Recorded:
    """Read T4 results. Their parameters' values are those that were tried, in order of size.

    Raises ContainerError where they aren't T4 results.
    """
    whole = _load(path)
    try:
        results = whole["results"]
        configs = [
            Config(**{name: _value(v) for name, v in one["configuration"].items()})
            for one in results
        ]
        outcomes = [_evaluated(one) for one in results]
        params = tuple(
            Param(name, _ordered({config[name] for config in configs}), "")
            for name in (results[0]["configuration"] if results else ())
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ContainerError(
            f"{path}: are no T4 results ({error!r}); give a file of schema {_SCHEMA}"
        ) from error
    return _recorded(path, path.name, "", params, configs, outcomes)


def _evaluated(one: Mapping[str, Any]) -> tuple[float, str]:
    validity = one["invalidity"]
    statuses = {name: status for status, name in _VALIDITY.items()}
    if validity != "correct":
        return math.inf, statuses[validity]
    objective = (one.get("objectives") or ["time"])[0]
    found = {measured["name"]: measured for measured in one["measurements"]}[objective]
    return _usable(float(found["value"]) * _UNITS[found.get("unit", "")])


def _ordered(values: set[Value]) -> tuple[Value, ...]:
    return tuple(sorted(values, key=lambda v: (isinstance(v, str), v)))


def _value(value: Any) -> Value:
    """A parameter's value; fractions are taken as they are, and what isn't a number as text."""
    # other projects' spaces hold fractions, ours do not: Value has no float
    return value if isinstance(value, int | float | str) else str(value)  # type: ignore[return-value]


def _recorded(
    path: Path, name: str, device: str, params: tuple[Param, ...], configs: Sequence[Config],
    outcomes: Sequence[tuple[float, str]],
) -> Recorded:  # fmt: skip
    if not configs:
        raise ContainerError(f"{path}: holds no config; give a file of at least one attempt")
    try:
        candidates = from_configs(params, configs)
    except ConfigError as error:
        raise ContainerError(f"{path}: {error}") from error
    seconds, statuses = np.full(len(candidates), math.inf), [""] * len(candidates)
    for config, (time, status) in zip(configs, outcomes, strict=True):
        at = candidates.index(config)
        seconds[at], statuses[at] = time, status
    return Recorded(name, device, candidates, seconds, tuple(statuses))


def _load(path: Path) -> Any:
    try:
        packed = path.read_bytes()
        if packed[:2] == b"\x1f\x8b":
            packed = gzip.decompress(packed)
        text = packed.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ContainerError(f"{path}: can't be read: {error}; give JSON, plain or .gz") from error
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ContainerError(f"{path}: is nested too deeply; copy the file again") from error
    except ValueError:
        pass
    try:
        # Kernel Tuner appends a line a config and closes the braces when it is done.
        return json.loads(text.rstrip().rstrip(",") + "}}")
    except ValueError as error:
        raise ContainerError(f"{path}: is no JSON: {error}; copy the file again") from error


def _store(path: Path, text: str) -> None:
    data = text.encode()
    # No time of day in the header: the same attempts make the same file.
    write_atomically(path, [gzip.compress(data, mtime=0) if path.suffix == ".gz" else data])
