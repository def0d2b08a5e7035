"""Whether what was measured between two states of a device may be judged, and what was odd.

States are those of `bench.environment.device_state`, of this build or an older one: what a state
doesn't tell is unknown and gives no reason. Each reason is one sentence with its numbers.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.nvml import THROTTLING, throttle_names

__all__ = ["changed", "doubts", "forbids", "grouped"]

State = Mapping[str, Any]

# 1 % of the 0.1 s for which a case is sampled: what it hides is below the 3 % that a verdict needs.
THROTTLED_S = 1e-3

# Boost moves an H100's clock in steps of 15 of 1980 MHz; 3 % is the smallest effect of a verdict.
CLOCK_DIFFERS = 0.03

# More than boost takes back for heat alone: what happened is unknown, and as large as an effect.
CLOCK_FELL = 0.10

# Load of a second moves a GPU by a few degrees: the next case may be slowed down.
NEAR_SLOWDOWN_C = 5

# With others there for a tenth of the time medians hold, and means and quartiles no longer do.
OTHERS = 0.10

# The hypervisor gives no warning when it takes a CPU: every sample then is slow by all of it.
STEAL = 0.02

# A tick is sampled: of fewer than 20 one more or less is beyond 5 %. 100 a second on Linux.
FEW_TICKS = 20
TICK_S = 0.01

# Settings that stay as they are unless somebody changes them, with their unit.
_SETTINGS = {
    "power_limit_w": ("power limit", " W"),
    "mig": ("MIG mode", ""),
    "ecc": ("ECC mode", ""),
    "persistence": ("persistence mode", ""),
}
_SESSION = {
    "uuid": ("GPU", ""),
    "driver": ("driver", ""),
    **_SETTINGS,
    "cpus": ("set of CPUs", ""),
    "governor": ("governor", ""),
}

_COUNTERS = {
    "throttled_power_s": "power",
    "throttled_thermal_s": "thermal",
    "throttled_board_s": "board limit",
}

# A PID says which one, not how much.
_NUMBER = re.compile(r"(?<![\w.])(?<!pid )\d+(?:\.\d+)?(?![\w.])")


def forbids(before: State, after: State) -> tuple[str, ...]:
    """Why no verdict may be given on what was measured between the two states; empty if it may."""
    checks = (_silent, _throttled, _computed, _corrupted, _reset, _fell)
    return tuple(reason for check in checks for reason in check(before, after))


def doubts(before: State, after: State) -> tuple[str, ...]:
    """What was odd between the two states, but forbids nothing."""
    checks = (_shared_cpu, _cpu_clock, _heat, _held_memory, _failing_memory, _unsteady)
    return tuple(reason for check in checks for reason in check(before, after))


def changed(states: Sequence[State]) -> tuple[str, ...]:
    """What didn't stay the same in the states of a session, in their order."""
    return tuple(_changes(_SESSION, states))


def _rise(before: State, after: State, key: str) -> float:
    """By how much a counter rose; 0 where that is unknown, or it began anew."""
    first, last = before.get(key), after.get(key)
    return 0.0 if first is None or last is None else max(0.0, last - first)


def _silent(before: State, after: State) -> Iterator[str]:
    if "nvml_error" in before:
        yield f"the GPU didn't answer: {before['nvml_error']}"
    elif "nvml_error" in after:
        yield f"the GPU stopped answering: {after['nvml_error']}"


def _throttled(before: State, after: State) -> Iterator[str]:
    lasted_s = _rise(before, after, "monotonic_s")
    for key, name in _COUNTERS.items():
        held_s = _rise(before, after, key)
        if held_s >= THROTTLED_S:
            share = f" of {lasted_s * 1e3:.0f} ms" if lasted_s else ""
            yield f"GPU throttled: {name} for {held_s * 1e3:.0f} ms{share}"
    for state, when in ((before, "at the start"), (after, "at the end")):
        names = throttle_names(state.get("throttle_reasons")) or ()
        if held := [name for name in names if name in THROTTLING]:
            yield f"GPU throttled {when}: {', '.join(held)}"


def _others(before: State, after: State) -> dict[int, Mapping[str, Any]]:
    """Foreign processes by PID, as they were last seen; one that computed in either state did."""
    seen: dict[int, Mapping[str, Any]] = {}
    for process in (*(before.get("foreign") or ()), *(after.get("foreign") or ())):
        if process["pid"] not in seen or process.get("sm_percent") != 0:
            seen[process["pid"]] = process
    return seen


def _computed(before: State, after: State) -> Iterator[str]:
    for pid, process in _others(before, after).items():
        used = process.get("sm_percent")
        if used is None:  # which may be all of it
            yield f"another process is on the GPU: pid {pid}"
        elif used > 0:
            yield f"another process computed on the GPU: pid {pid}, {used} % of it"


def _held_memory(before: State, after: State) -> Iterator[str]:
    for pid, process in _others(before, after).items():
        if process.get("sm_percent") == 0:
            size = process.get("memory_bytes")
            held = "memory" if size is None else f"{size / 1e9:.1f} GB"
            yield f"another process holds {held} of the GPU: pid {pid}"
    unplaced = [state.get("unplaced_pids") or () for state in (before, after)]
    count = max(map(len, unplaced))
    if count > 1:  # one is this process
        yield f"{count} processes on the GPU may be others': a container hides whose they are"


def _corrupted(before: State, after: State) -> Iterator[str]:
    count = max(_rise(before, after, key) for key in ("ecc_volatile", "ecc_aggregate"))
    if count:
        yield f"{count:.0f} uncorrected errors of the GPU's memory"


def _failing_memory(before: State, after: State) -> Iterator[str]:
    if count := before.get("ecc_volatile"):
        yield f"{count} uncorrected errors of the GPU's memory before"
    if after.get("rows_pending"):
        yield "memory of the GPU waits to be replaced: it needs a reset"


def _reset(before: State, after: State) -> Iterator[str]:
    return _changes(_SETTINGS, (before, after))


def _changes(keys: Mapping[str, tuple[str, str]], states: Sequence[State]) -> Iterator[str]:
    for key, (name, unit) in keys.items():
        known = [state[key] for state in states if state.get(key) is not None]
        steps = known[:1] + [new for old, new in itertools.pairwise(known) if new != old]
        if len(steps) > 1:
            yield f"{name} changed: {' to '.join(_said(step) + unit for step in steps)}"


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _clock_moved(before: State, after: State) -> float:
    """The SM clock's change as a part of what it was; 0 where an idle GPU or a gap hides it."""
    first, last = before.get("sm_mhz"), after.get("sm_mhz")
    idle = any(
        "gpu_idle" in (throttle_names(state.get("throttle_reasons")) or ())
        for state in (before, after)
    )
    return 0.0 if idle or not first or last is None else (last - first) / first


def _fell(before: State, after: State) -> Iterator[str]:
    if -_clock_moved(before, after) > CLOCK_FELL and not any(_throttled(before, after)):
        yield f"the SM clock fell without a reason: {before['sm_mhz']} to {after['sm_mhz']} MHz"


def _unsteady(before: State, after: State) -> Iterator[str]:
    moved = _clock_moved(before, after)
    if abs(moved) > CLOCK_DIFFERS and not any(_fell(before, after)):
        yield f"the SM clock moved: {before['sm_mhz']} to {after['sm_mhz']} MHz"
    if after.get("persistence") is False:
        yield "persistence mode of the GPU is off"


def _heat(before: State, after: State) -> Iterator[str]:
    hot, limit = after.get("temperature_c"), after.get("slowdown_c")
    margin = after.get("margin_c")
    if margin is None and hot is not None and limit is not None:
        margin = limit - hot
    if margin is not None and margin <= NEAR_SLOWDOWN_C:
        yield f"the GPU is {margin} degrees from being slowed down for heat"
    times = _rise(before, after, "thermal_throttles")
    if times:
        yield f"CPUs were slowed down for heat {times:.0f} times"


def _shared_cpu(before: State, after: State) -> Iterator[str]:
    keys = ("busy_ticks", "idle_ticks", "steal_ticks")
    if any(state.get(key) is None for state in (before, after) for key in keys):
        return
    busy, idle, steal = (_rise(before, after, key) for key in keys)
    total = busy + idle + steal
    if total < FEW_TICKS:
        return
    own_s = _rise(before, after, "own_cpu_s")
    if own_s:  # nothing: unknown, or of two processes
        others = (busy - own_s / TICK_S) / total
        if others > OTHERS:
            yield f"others used {100 * others:.0f} % of the CPUs"
    if steal / total > STEAL:
        yield f"the hypervisor took {100 * steal / total:.0f} % of the CPUs"


def _cpu_clock(before: State, after: State) -> Iterator[str]:
    for governor in sorted({before.get("governor") or "", after.get("governor") or ""}):
        if governor not in ("", "performance"):
            yield f"the CPUs' governor is {governor}, not performance"


def grouped(found: Iterable[Iterable[str]]) -> dict[str, int]:
    """How many of `found` have each reason, the most frequent first.

    Reasons that differ in their numbers alone are one, with the least and the greatest of each.
    """
    alike: dict[str, list[str]] = {}
    counts = Counter[str]()
    for reasons in found:
        kinds = set()
        for reason in reasons:
            kind = _NUMBER.sub("#", reason)
            alike.setdefault(kind, []).append(reason)
            kinds.add(kind)
        counts.update(sorted(kinds))
    return {_ranged(alike[kind]): count for kind, count in counts.most_common()}


def _ranged(reasons: Sequence[str]) -> str:
    """Sentences that differ in their numbers as one, with the least and the greatest of each."""
    columns = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    ends = [(min(column, key=float), max(column, key=float)) for column in columns]
    ranges = iter(low if low == high else f"{low} to {high}" for low, high in ends)
    return _NUMBER.sub(lambda _: next(ranges), reasons[0])
