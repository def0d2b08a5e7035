"""Measurement: one attempt at one config, with everything needed to judge it later.

Raw samples are kept and nothing is rounded; medians and quantiles are derived when asked for.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = ["Correctness", "Measurement", "Status", "Timer", "Timing"]

# perf_counter: one call on a CPU. cuda_event: one call between two events, behind queued work.
# cuda_graph: a call's share of a graph's replay, launches and gaps between kernels as a model has
# them. Times of two timers are never compared.
Timer = Literal["perf_counter", "cuda_event", "cuda_graph"]

Status = Literal["ok", "checked", "constraint", "compile", "runtime", "incorrect", "timeout"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How samples were taken: timer, warm-up, copies rotated over, cache state of each operand."""

    timer: Timer
    warmup_s: float
    copies: int
    cache: Mapping[str, Literal["hot", "cold"]]
    threads: int | None = None
    pinned: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correctness:
    """The oracle's verdict: `worst` error over its bound (up to 1 passes), and controls caught."""

    worst: float
    max_abs: float
    relative_rms: float
    controls: Mapping[str, bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One attempt. Times in seconds, sizes in bytes.

    status: `ok` (right and timed), `checked` (right, not timed), or what went wrong; samples
        exist exactly when it is `ok`, a reason exactly when it is neither.
    weight_bytes: of the packed weight. peak_bytes: allocated beside it while a call ran; None
        where the system can't tell. flops: operations that the kernel really does.
    floor_s: the least time that its bytes and operations could take here.
    """

    status: Status
    reason: str = ""
    samples_s: tuple[float, ...] = ()
    timing: Timing | None = None
    correctness: Correctness | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    moved_bytes: int | None = None
    flops: int | None = None
    floor_s: float | None = None
    compile_s: float | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(
                f"measurement: status {self.status!r} is not one of {get_args(Status)}"
            )
        if (self.status == "ok") != bool(self.samples_s):
            raise ValueError("measurement: samples exist exactly when the status is ok")
        if (self.status in ("ok", "checked")) == bool(self.reason):
            raise ValueError("measurement: a reason goes with every status but ok and checked")
        if self.status in ("ok", "checked") and self.correctness is None:
            raise ValueError("measurement: nothing is ok that the oracle has not seen")

    @property
    def median_s(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples_s)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        if len(self.samples_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return (high - low) / 2 / self.median_s

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Measurement:
        """A measurement from `to_dict`'s output."""
        values = dict(fields)
        values["samples_s"] = tuple(values.get("samples_s", ()))
        for name, kind in (("timing", Timing), ("correctness", Correctness)):
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        return cls(**values)
