"""Second moments of the inputs of linear layers, by module."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vqkernels.calibration.sums import Sums
from vqkernels.errors import TensorError

__all__ = [
    "Calibration",
    "CalibrationWarning",
    "Moments",
    "check_holdout",
    "moments_of",
    "warn_of_few",
]

# What rounding to float32 may cost; a damaged file is off by far more.
TOLERANCE = 1e-4


class CalibrationWarning(UserWarning):
    """A calibration run that says too little of a layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Of a layer's inputs x, over `count` tokens.

    diagonal: `[k]` float32, mean of x_j^2.
    gram: `[k, k]` float32, mean of x x^T, or None.
    inputs: `[rows, k]` float32, inputs that no moment is of, for checks of the layer's output;
        None where none were held out.
    """

    diagonal: Tensor
    gram: Tensor | None
    count: int
    inputs: Tensor | None = None

    def check(self, where: str) -> None:
        """Raise TensorError, which starts with `where`, for what are no second moments."""
        k = self.diagonal.numel()
        shapes = {"diagonal": ((k,), self.diagonal), "gram": ((k, k), self.gram)}
        rows = 0 if self.inputs is None else len(self.inputs)
        for name, (shape, value) in (shapes | {"inputs": ((rows, k), self.inputs)}).items():
            if value is None:
                continue
            if tuple(value.shape) != shape or value.dtype != torch.float32:
                raise TensorError(
                    f"{where}: {name} is {value.dtype} {list(value.shape)}, not float32 "
                    f"{list(shape)}; calibrate again"
                )
            if not bool(torch.isfinite(value).all()):
                raise TensorError(f"{where}: {name} holds NaN or infinity; calibrate again")
        if self.count < 1 or k < 1:
            raise TensorError(f"{where}: moments of {self.count} tokens; calibrate again")
        if bool((self.diagonal < 0).any()):
            raise TensorError(f"{where}: a mean square below 0; calibrate again")
        if self.gram is not None:
            _check_gram(where, self.gram, self.diagonal)


def _check_gram(where: str, gram: Tensor, diagonal: Tensor) -> None:
    scale = diagonal.sqrt()
    # an input that is all but dead (1e-16) has squares that underflow, and products that don't
    slack = TOLERANCE * (scale * scale[:, None] + TOLERANCE * diagonal.max())
    if bool(((gram - gram.T).abs() > slack).any()):
        raise TensorError(f"{where}: gram is not symmetric; calibrate again")
    if bool(((gram.diagonal() - diagonal).abs() > slack.diagonal()).any()):
        raise TensorError(f"{where}: the diagonal is not gram's; calibrate again")
    if bool((gram.abs() > scale * scale[:, None] + slack).any()):
        raise TensorError(f"{where}: gram is larger than its diagonal allows; calibrate again")


class Calibration(Mapping[str, Moments]):
    """Moments by module path (`encoder.layer.0.output.dense`), as `named_modules` has it.

    moments: by module; a mapping that reads them when asked is asked each time.
    provenance: where they come from, in words: kept in files.
    """

    def __init__(
        self, moments: Mapping[str, Moments], provenance: Mapping[str, str] | None = None
    ) -> None:
        self._moments = moments
        self.provenance = dict(provenance or {})

    @classmethod
    def from_activations(
        cls, activations: Mapping[str, Tensor], *, full: bool = True, holdout: float = 0.1
    ) -> Calibration:
        """Of inputs that a run recorded: `[..., k]` for each module, tokens in their order.

        full: whether to keep X^T X, or the diagonal alone.
        holdout: share of the tokens, the last ones (neighbours are too alike to test with), that
            `inputs` is drawn from instead.

        Raises TensorError for inputs that are not finite floats; warns (CalibrationWarning) where
        there are fewer tokens than inputs.
        """
        check_holdout(holdout)
        sums = {}
        for name, values in activations.items():
            if values.ndim < 1 or not values.is_floating_point() or not values.numel():
                raise TensorError(
                    f"{name}: {values.dtype} {list(values.shape)}; give inputs as floats, "
                    f"[tokens, k]"
                )
            rows = values.detach().reshape(-1, values.shape[-1])
            train = len(rows) - int(len(rows) * holdout)
            sums[name] = Sums(rows.shape[1], full=full)
            sums[name].add(rows[:train], name)
            sums[name].hold(rows[train:], name)
        found = moments_of(sums)
        warn_of_few(found)
        return cls(found)

    def of_weight(self, name: str) -> Moments | None:
        """Moments of the inputs that a weight meets, by its tensor's name: `[module].weight`."""
        return self.get(name.removesuffix(".weight"))

    def __getitem__(self, module: str) -> Moments:
        return self._moments[module]

    def __contains__(self, module: object) -> bool:
        # the Mapping's own would read the moments
        return module in self._moments

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def check_holdout(holdout: float) -> None:
    """Raise TensorError for a share that leaves less than half to calibrate with."""
    if not 0 <= holdout < 0.5:
        raise TensorError(f"calibration: holdout {holdout}; use 0 or more, and less than 0.5")


def moments_of(sums: Mapping[str, Sums]) -> dict[str, Moments]:
    """Of what was summed up for each module; modules without a token are left out."""
    made: dict[int, Moments] = {}  # a module of two names has one
    found = {}
    for name, one in sums.items():
        if one.count:
            if id(one) not in made:
                made[id(one)] = Moments(*one.means(), one.count, one.held())
            found[name] = made[id(one)]
    return found


def warn_of_few(found: Mapping[str, Moments]) -> None:
    """Warn where X^T X can't have full rank."""
    few = [
        name
        for name, one in found.items()
        if one.gram is not None and one.count < one.diagonal.numel()
    ]
    if few:
        first = found[few[0]]
        warnings.warn(
            f"calibration: {len(few)} of {len(found)} layers have fewer tokens than inputs "
            f"({few[0]}: {first.count:,} tokens, {first.diagonal.numel():,} inputs), so X^T X "
            f"lacks rank; run more text, or keep the diagonal alone",
            CalibrationWarning,
            stacklevel=3,
        )
