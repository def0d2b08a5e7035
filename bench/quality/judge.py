"""The measuring: each quantised matrix against its dense one, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.quality.candidates import Candidate
from bench.quality.layers import Calibrated, LayerQuality, measure_layer
from bench.quality.original import Original, counterpart
from bench.quality.report import Judged
from vqkernels.errors import ContainerError, TensorError, UnsupportedError
from vqkernels.tensor import QuantizedTensor

__all__ = ["judge"]


def judge(
    candidate: Candidate,
    original: Original,
    moments_of: Callable[[str], Calibrated | None],
    *,
    seed: int,
    on_layer: Callable[[str], None],
    keep: dict[str, QuantizedTensor] | None = None,
) -> Judged:
    """Measure every matrix of `candidate`; `on_layer` is called with each name afterwards.

    moments_of: what a calibration knows of the layer of one of the dense model's tensors.
    keep: gets the matrices, for what needs all of them.

    Raises ContainerError where no matrix is of the dense model, TensorError where a shape is not
    the dense model's, and whatever reading the matrices raises.
    """
    places = {name: counterpart(original, name) for name in candidate.tensors}
    if not any(places.values()):
        raise ContainerError(
            f"{candidate.label}: none of its {len(places)} matrices ({_some(places)}) is in "
            f"{original.path} ({_some(original)}); give the model that it was made from"
        )
    layers, refused = list[LayerQuality](), dict[str, str]()
    for name, place in places.items():
        tensor = None if place is None else _tensor(candidate, name, refused)
        if place is not None and tensor is not None:
            try:
                one = measure_layer(
                    original[place],
                    tensor,
                    layer=name,
                    name=place,
                    moments=moments_of(place),
                    seed=seed,
                    made=candidate.made.get(name, {}),
                )
            except TensorError as error:
                raise TensorError(f"{candidate.label}: tensor {name!r}: {error}") from error
            layers.append(one)
            if keep is not None:
                keep[name] = tensor
        on_layer(name)
    made_from = set(places.values())
    return Judged(
        label=candidate.label,
        origin=candidate.origin,
        layers=tuple(layers),
        refused=refused,
        unmatched=tuple(name for name, place in places.items() if place is None),
        dense=tuple(name for name in original if name not in made_from),
        sections={},
    )


def _tensor(candidate: Candidate, name: str, refused: dict[str, str]) -> QuantizedTensor | None:
    try:
        return candidate.tensors[name]
    except UnsupportedError as error:
        refused[name] = str(error)
        return None


def _some(names: Mapping[str, object]) -> str:
    return ", ".join([*list(names)[:2], *(["..."] if len(names) > 2 else [])])
