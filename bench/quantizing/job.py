"""What the layers of a quantised model depend on, and what its container says of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vqkernels
from vqkernels.container.manifest import Coding
from vqkernels.container.origin import Made, Value, library_stamp
from vqkernels.quantize import Recipe
from vqkernels.spec import CodebookSpec

__all__ = ["Job", "sha256_of"]


_SHARED = "shared by the layers of one format"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that finished layers depend on: what was begun is gone on with where these are equal.

    source_sha256: of the model's tensors, as `sha256_of` has it.
    formats: of each tensor to quantise, by name, in order.
    bias: whether a layer's bias is kept beside its weight.
    codes: how codes are stored.
    shared: whether layers of one format share their codebooks.
    calibration: file name and SHA-256 of what errors' importance is known from, or None.
    """

    source_sha256: str
    formats: Mapping[str, CodebookSpec]
    seed: int
    recipe: Recipe
    bias: bool
    codes: Coding
    shared: bool = False
    calibration: tuple[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON has it, with the versions of what computes."""
        return {
            "source_sha256": self.source_sha256,
            "formats": {name: spec.to_dict() for name, spec in self.formats.items()},
            "seed": self.seed,
            "recipe": dataclasses.asdict(self.recipe),
            "bias": self.bias,
            "codes": self.codes,
            "shared": self.shared,
            "calibration": self.calibration and self.calibration[1],
            "vqbench": vqkernels.__version__,
            "libraries": library_stamp(),
        }

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 that tells this job from any other."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def provenance(self) -> dict[str, str]:
        """What is the same for all layers, as a container's provenance names it."""
        methods = {spec.method for spec in self.formats.values()}
        changed = {f: value for f, value in self.recipe.to_dict().items() if f != "iterations"}
        told = ", ".join(f"{field}={_value(value)}" for field, value in changed.items())
        file, digest = self.calibration or ("", "")
        return {
            "source_sha256": self.source_sha256,
            **({"method": methods.pop()} if len(methods) == 1 else {}),
            "seed": str(self.seed),
            "iterations": str(self.recipe.iterations),
            **({"codebooks": _SHARED} if self.shared else {}),
            **({"recipe": told} if told else {}),
            **({"calibration": file, "calibration_sha256": digest} if file else {}),
            "libraries": library_stamp(),
        }

    def made(
        self, name: str, error: float, *, clip: tuple[float, float] | None, calibrated: bool
    ) -> Made:
        """How layer `name` was made; an infinite error (of a weight of zeros) is left out.

        clip: what the weights were limited to.
        """
        found: dict[str, Value] = {
            "method": self.formats[name].method,
            "seed": self.seed,
            "iterations": self.recipe.iterations,
        }
        found |= {field: _value(value) for field, value in self.recipe.to_dict().items()}
        if clip is not None:  # the recipe's percent, which this name doesn't stand for in a file
            found["clip"] = list(clip)
            found["clip_percentiles"] = [self.recipe.clip, 100 - self.recipe.clip]
        if self.shared:
            found["codebooks"] = _SHARED
        if calibrated and self.calibration:
            found["calibration"] = f"{self.calibration[0]} (SHA-256 {self.calibration[1]})"
        return found | ({"error": error} if math.isfinite(error) else {})


def _value(value: Any) -> Value:
    """A recipe's value as a container holds it, which has no truth values."""
    return str(value).lower() if isinstance(value, bool) else value


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, that of what `sha256sum` prints of them, in their order."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = [f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
