"""How errors count in each layer: a calibration's moments, for the tensors that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from torch import Tensor

from vqkernels.calibration import Calibration, load_calibration
from vqkernels.errors import ContainerError, TensorError

__all__ = ["check_moments", "hessian_of", "opened"]


def opened(path: Path, names: Sequence[str]) -> Calibration:
    """The calibration in the file at `path`; says which of `names` it doesn't know.

    Raises ContainerError for what is none, and where it knows none of them.
    """
    calibration = load_calibration(path)
    unknown = [name for name in names if name.removesuffix(".weight") not in calibration]
    if len(unknown) == len(names):
        raise ContainerError(
            f"{path}: is of other layers ({next(iter(calibration), 'none')}, ...) than "
            f"{unknown[0]}; calibrate the model itself"
        )
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        click.echo(
            f"not in {path}, so every error counts alike there: {', '.join(unknown[:3])}{more}",
            err=True,
        )
    return calibration


def check_moments(
    calibration: Calibration, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Read every layer's moments once. Raises TensorError for those of another shape."""
    for name, (_, k) in shapes.items():
        moments = calibration.of_weight(name)
        if moments is not None and moments.diagonal.numel() != k:
            raise TensorError(
                f"{path}: layer {name!r} has {k} inputs, but {moments.diagonal.numel()} were "
                f"calibrated; calibrate this model"
            )


def hessian_of(calibration: Calibration | None, name: str) -> Tensor | None:
    """What `quantize(hessian=...)` takes for the weight `name`: X^T X, or its diagonal."""
    moments = calibration.of_weight(name) if calibration else None
    if moments is None:
        return None
    return moments.diagonal if moments.gram is None else moments.gram
