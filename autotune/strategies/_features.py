"""What a model sees of a config: each parameter as a place on a scale, and as a name.

A value's rank and its logarithm are trends. A whole number above 0 also has its largest power of
two and its odd factor: tiles, vector widths and thread counts are fast where they divide evenly,
and no trend in the value itself shows that. And any value may simply be unlike the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.candidates import Candidates
from vqkernels.space import Value

__all__ = ["Feature", "features"]

_Floats = NDArray[np.float64]
# Two scales that place every value alike within this are one feature.
_SAME = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Feature:
    """A view of parameter `param`: `table[place of its value]` is a point, `[values, width]`.

    Points lie within distance 1 of each other. named: no scale, all values are equally far apart.
    """

    param: int
    table: _Floats
    named: bool

    def points(self, rows: NDArray[np.int16]) -> _Floats:
        """The points of some candidates' rows, `[rows, width]`."""
        return self.table[rows[:, self.param]]


def features(candidates: Candidates) -> list[Feature]:
    """Every view of each parameter that varies."""
    found = []
    for at, param in enumerate(candidates.params):
        used = np.unique(candidates.rows[:, at])
        values = [param.values[place] for place in used]
        if len(values) < 2:
            continue
        for scale in _scales(values):
            table = np.zeros((len(param.values), 1))
            table[used, 0] = scale
            found.append(Feature(at, table, named=False))
        if len(values) > 2 or isinstance(values[0], str):
            table = np.zeros((len(param.values), len(used)))
            table[used, np.arange(len(used))] = 2**-0.5
            found.append(Feature(at, table, named=True))
    return found


def _scales(values: Sequence[Value]) -> list[_Floats]:
    """Places of `values` between 0 and 1, on each scale that tells something new."""
    if any(isinstance(value, str) for value in values):
        return []
    numbers = np.array(values, float)
    found = [np.argsort(np.argsort(numbers)) / (len(numbers) - 1)]
    if len(numbers) < 3 or numbers.min() <= 0:
        return found
    logs = _unit(np.log(numbers))
    if np.abs(logs - found[0]).max() > _SAME:
        found.append(logs)
    if len(numbers) > 3 and (numbers == numbers.astype(np.int64)).all():
        whole = numbers.astype(np.int64)
        power = (whole & -whole).astype(float)
        odd = numbers / power
        # Powers of two alone, or odd numbers alone: the logarithm has said it.
        if np.ptp(power) > 0 and np.ptp(odd) > 0:
            found += [_unit(np.log(power)), _unit(np.log(odd))]
    return found


def _unit(numbers: _Floats) -> _Floats:
    unit: _Floats = (numbers - numbers.min()) / np.ptp(numbers)
    return unit
