"""Spaces to search in tests: recorded ones, and a made-up one with rules and failures."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np

from autotune.candidates import enumerate_space
from autotune.replay import Recorded, load_cache
from vqkernels.space import Config, Constraint, Param, Space

FOLDER = Path(__file__).parent / "spaces"
SPACE = Space(
    (
        Param("rows", (1, 2, 4, 8, 16), ""),
        Param("warps", (1, 2, 4, 8), ""),
        Param("layout", ("plain", "packed", "planes"), ""),
        Param("unroll", (1, 2, 3, 4), ""),
    ),
    (Constraint("threads", lambda c: c.number("rows") * c.number("warps") <= 64),),
)


def seconds(config: Config) -> float:
    """Fastest at (4, 4, planes, 3); unrolling a large tile doesn't compile."""
    if config.number("rows") * config.number("unroll") > 32:
        return math.inf
    rows, warps = (math.log2(config.number(name)) for name in ("rows", "warps"))
    layout = {"plain": 0.5, "packed": 0.9, "planes": 0.0}[config.text("layout")]
    off = (rows - 2) ** 2 + (warps - 2) ** 2 + abs(config.number("unroll") - 3)
    return 1e-3 * (1 + 0.2 * off + layout)


@functools.cache
def made_up() -> Recorded:
    candidates = enumerate_space(SPACE)
    times = np.array([seconds(config) for config in candidates])
    statuses = tuple("ok" if math.isfinite(time) else "compile" for time in times)
    return Recorded("made up", "none", candidates, times, statuses)


@functools.cache
def recorded(name: str) -> Recorded:
    return load_cache(FOLDER / f"{name}.json.gz")


def names() -> list[str]:
    """Whatever recorded spaces lie in the folder."""
    return sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
