"""Recipe: how codes and codebooks are found, for a format that says what they are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_type_hints

from vqkernels.errors import SpecError

__all__ = ["Recipe"]

Clustering = Literal["lloyd", "minibatch", "medians", "medoids", "ema", "gradient"]
Init = Literal["kmeans++", "random"]
Scaling = Literal["rms", "std", "l2", "max"]
Rotation = Literal["auto", "learned", "hadamard", "random", "whitening"]
SideBy = Literal["auto", "hessian", "magnitude", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a format's codes and codebooks are found; every field has a default that serves.

    iterations: of each clustering.
    clustering: what finds a codebook: `lloyd`, `minibatch` (`batch` vectors a step), `medians`
        (L1), `medoids` (entries are vectors of the weight), or as in VQ-VAE, `batch` vectors a
        step: `ema` (moving averages), `gradient` (Adam).
    init: of the first entries: `kmeans++`, or `random` vectors of the weight.
    batch: vectors of a step, for `minibatch`, `ema` and `gradient`.
    decay: of `ema`'s averages at each step.
    expiry: `ema` and `gradient` put an entry on another vector where its use falls below this share
        of the mean; 0: never.
    rate: of learning, for `gradient` and `tune`, over the root mean square of what is learned.
    sample: vectors that a codebook is trained on at most, drawn anew from the seed; 0: all.
    beam: candidates that are kept for each vector from stage to stage; 1: greedy.
    refits: rounds in which all stages' codebooks are solved for together and codes found anew.
    tune: steps in which codebooks and codes are learned together by straight-through gradients of
        the error that counts, after all else; 0: none.
    commitment: how strongly `tune` draws what is coded to its code.
    norm_limit: of an entry, over the root mean square norm of the vectors; 0: none.
    merge: entries nearer than so many times the root mean square norm become one, and the freed
        one splits the heaviest cluster; 0: only unused entries do.
    clip: percent of the weights at each end that are limited while codebooks are trained.
    scaling: what a format's scale is: root mean square, standard deviation, L2 norm or largest.
    rotation: of a format that has one: `learned` (OPQ), `hadamard` (random signs), `random`
        (orthogonal) or `whitening`; `auto`: learned for `opq`, else hadamard.
    sides: what picks outlier and uniform columns: the Hessian's diagonal, magnitude, or the error
        that coding them would leave; `auto`: the Hessian where there is one, else magnitude.
    propagate: whether a column's error is made up for by the columns after it, where a full
        Hessian is known.
    damping: added to a Hessian's diagonal, as a share of its mean.

    Raises SpecError, one line, for a value that a field can't have.
    """

    iterations: int = 25
    clustering: Clustering = "lloyd"
    init: Init = "kmeans++"
    batch: int = 4096
    decay: float = 0.99
    expiry: float = 0.01
    rate: float = 0.05
    sample: int = 0
    beam: int = 16
    refits: int = 8
    tune: int = 0
    commitment: float = 1.0
    norm_limit: float = 0.0
    merge: float = 0.0
    clip: float = 0.0
    scaling: Scaling = "rms"
    rotation: Rotation = "auto"
    sides: SideBy = "auto"
    propagate: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        hints = get_type_hints(Recipe)
        for field in dataclasses.fields(self):
            _check_field(field.name, getattr(self, field.name), hints[field.name])
        for name in ("iterations", "batch", "beam"):
            if getattr(self, name) < 1:
                raise SpecError(f"recipe: {name} must be at least 1")
        if self.decay >= 1:
            raise SpecError(f"recipe: decay {self.decay} never learns; use less than 1")
        if self.clip >= 50:
            raise SpecError(f"recipe: clip {self.clip} limits everything; use less than 50 percent")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults; `from_dict` is the inverse."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """A recipe from names and values; an unknown name is a SpecError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise SpecError(f"recipe: unknown field {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**fields)


def _check_field(name: str, value: object, hint: object) -> None:
    if choices := get_args(hint):
        if value not in choices:
            raise SpecError(f"recipe: {name} {value!r} is not one of {', '.join(choices)}")
    elif hint is bool:
        if not isinstance(value, bool):
            raise SpecError(f"recipe: {name} must be true or false, not {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int if hint is int else int | float):
        kind = "whole number" if hint is int else "number"
        raise SpecError(f"recipe: {name} must be a {kind}, not {value!r}")
    elif not (math.isfinite(value) and value >= 0):
        raise SpecError(f"recipe: {name} must be a finite number >= 0, not {value!r}")
