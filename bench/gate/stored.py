"""A gate against stored results: advice, since the machine of then is not the machine of now.

The candidate runs in fresh processes as ever; the baseline's times come from a file, which must be
of the same device, driver, compilers and power limit, timed in the same way.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gate.decide import Conclusion, Rules, conclude
from bench.gate.journal import Round, Sample, case_name
from bench.gate.session import Session
from bench.records import measurement_of, read_records
from vqkernels.errors import BackendError

__all__ = ["Stored", "conclude_stored", "read_stored"]

# The compilers of each kind of kernel: what moves times without being the kernel. torch's threads
# and allocator serve all.
_COMPILERS = {
    "numba": ("numba", "llvmlite"),
    "triton": ("triton",),
    "cuda": ("cuda-core", "cuda-bindings"),
}


def conclude_stored(session: Session, stored: Mapping[str, Stored], rules: Rules) -> Conclusion:
    """Measure the session's one side, and hold it against what is stored.

    Raises BackendError where no case is comparable, SideError where the side doesn't run.
    """
    found = session.samples(Round("stored", 0), session.job.targets)
    before, skipped = _matched(found, stored)
    cases = [one for one in session.job.targets if one.name not in skipped]
    samples = [one for one in found if one.case not in skipped]
    concluded = conclude(cases, [*before, *samples], [], rules)
    return dataclasses.replace(concluded, skipped={**skipped, **concluded.skipped})


@dataclasses.dataclass(frozen=True)
class Stored:
    """A case as a file has it: the median of each process, and the facts that must agree."""

    path: Path
    medians: list[float]
    facts: Mapping[str, Any]


def read_stored(path: Path) -> dict[str, Stored]:
    """What a file tells of each case: of a gate's records those of its candidate.

    Raises ContainerError where it can't be read, BackendError where it holds no time, or those of
    several machines.
    """
    found: dict[str, Stored] = {}
    for record in read_records(path):
        if record["status"] != "ok" or record.get("gate", {}).get("side") == "baseline":
            continue
        name, facts = case_name(record), _facts(record)
        known = found.setdefault(name, Stored(path, [], facts))
        if differing := _differ(known.facts, facts):
            raise BackendError(f"{path}: {name}: its records differ in {differing}; give one run's")
        known.medians.append(measurement_of(record).median_s)
    if not found:
        raise BackendError(f"{path}: holds no time; give a file of `vqbench run` or `gate`")
    return found


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    device, timing = record["device"], record["timing"]
    before = record["state"].get("before", {})
    compilers = _COMPILERS.get(record["kernel"].partition("/")[0], ())
    return {
        "device": (device["name"], device.get("arch"), device.get("units")),
        "driver": device.get("driver"),
        "power limit": before.get("power_limit_w"),
        **{name: record["versions"].get(name) for name in ("torch", *compilers)},
        **{name: timing[name] for name in ("timer", "cache", "threads", "pinned")},
    }


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first fact that isn't the same, with both values."""
    return next(
        (f"{name} ({value} there, {other[name]} here)" for name, value in one.items()
         if value != other[name]),
        None,
    )  # fmt: skip


def _matched(
    found: Sequence[Sample], stored: Mapping[str, Stored]
) -> tuple[list[Sample], dict[str, str]]:
    """The stored times as samples that pair with `found`, and the cases that have none."""
    path = next(iter(stored.values())).path
    before: list[Sample] = []
    skipped: dict[str, str] = {}
    cases: dict[str, list[Sample]] = {}
    for one in found:
        cases.setdefault(one.case, []).append(one)
    for name, samples in cases.items():
        if any(one.measurement.status != "ok" for one in samples):
            continue  # what became wrong needs no baseline
        if name not in stored:
            skipped[name] = f"not in {path}"
            continue
        first = samples[0]
        if differing := _differ(stored[name].facts, _sample_facts(first)):
            skipped[name] = f"not comparable: {differing}"
            continue
        for one, median in zip(samples, itertools.cycle(stored[name].medians), strict=False):
            measured = dataclasses.replace(one.measurement, samples_s=(median,))
            before.append(
                dataclasses.replace(
                    one, side="baseline", measurement=measured, state={}, identity="stored"
                )
            )
    if cases and len(skipped) == len(cases):
        raise BackendError(f"{path}: no case can be compared: {next(iter(skipped.values()))}")
    return before, skipped


def _sample_facts(one: Sample) -> dict[str, Any]:
    timing = one.measurement.timing
    assert timing is not None, "what is ok was timed"
    return _facts(
        {
            "kernel": one.case.rpartition(" ")[2],
            "device": one.device,
            "state": one.state,
            "versions": one.versions,
            "timing": dataclasses.asdict(timing),
        }
    )
