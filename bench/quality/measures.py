"""The numbers of the report: what each is called, which way is better, and what sums a model up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

__all__ = ["MEASURES", "Measure", "Values", "total"]

Values = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a layer.

    heading: over its column. better: the way in which it gets better. over_layers: how the number
    of a whole model follows from its layers': `mean` weighs each layer by its number of weights.
    """

    heading: str
    better: Literal["low", "high"]
    over_layers: Literal["mean", "sum", "min", "max"] = "mean"


# `vqkernels.quality` defines them, docs/quality.md tells how to read them.
MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "bits": Measure("bits/weight", "low"),
        "index_bits": Measure("index", "low"),
        "codebook_bits": Measure("codebook", "low"),
        "side_bits": Measure("side", "low"),
        "mse": Measure("MSE", "low"),
        "relative_error": Measure("error", "low"),
        "cosine": Measure("cosine", "high"),
        "max_error": Measure("max error", "low", "max"),
        "weighted_error": Measure("weighted", "low"),
        "run_error": Measure("run error", "low"),
        "run_cosine": Measure("run cosine", "high"),
        "output_error": Measure("output error", "low"),
        "output_cosine": Measure("output cosine", "high"),
        "output_cosine_low": Measure("1 %", "high", "min"),
        "output_cosine_worst": Measure("worst", "high", "min"),
        "int8_cost": Measure("int8 cost", "low"),
        "entropy_share": Measure("entropy share", "high", "min"),
        "dead_entries": Measure("dead", "low", "sum"),
    }
)


def total(name: str, layers: Iterable[tuple[int, Values]]) -> float | None:
    """Measure `name` of all `layers` (weights, values) that have it; None where none has."""
    known = [(weights, value) for weights, one in layers if (value := one.get(name)) is not None]
    if not known:
        return None
    values = [value for _, value in known]
    match MEASURES[name].over_layers:
        case "sum":
            return sum(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "mean":
            return sum(weights * value for weights, value in known) / sum(w for w, _ in known)
