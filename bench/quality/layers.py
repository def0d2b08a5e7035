"""One layer's part of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from bench.format_text import changed_fields
from bench.quality.measures import Values
from vqkernels.container.origin import Made
from vqkernels.quality import (
    CodeUsage,
    distortion,
    gaussian_inputs,
    output_error,
    rounding_cost,
    run_error,
    usage,
)
from vqkernels.tensor import QuantizedTensor

__all__ = ["Calibrated", "Inputs", "LayerQuality", "measure_layer"]

Inputs = Literal["held-out", "run", "gaussian"]


class Calibrated(Protocol):
    """What a calibration knows of a layer's inputs (`vqkernels.calibration.Moments`)."""

    @property
    def diagonal(self) -> Tensor:
        """Mean square of each input: `[k]`."""

    @property
    def gram(self) -> Tensor | None:
        """Mean of x^T x: `[k, k]`."""

    @property
    def inputs(self) -> Tensor | None:
        """Held-out inputs: `[tokens, k]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """A quantised layer against the dense one.

    layer: its name where it is quantised; tensor: in the dense model.
    format: fields of its spec that differ from their defaults.
    measures: by the names of `MEASURES`; None where that wasn't measured.
    inputs: what the layer's outputs were judged on: the calibration's `held-out` inputs (`tokens`
        of them), its whole `run` through its gram, where there are no such inputs, or `gaussian`
        ones, where no calibration knows the layer.
    usage: of each stage's entries, as `CodeUsage` has it, with `dead` and `perplexity`.
    made: how it was made, where that is known.
    """

    layer: str
    tensor: str
    n: int
    k: int
    format: Mapping[str, Any]
    measures: Values
    inputs: Inputs
    tokens: int
    usage: tuple[Mapping[str, Any], ...]
    made: Made

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.n * self.k


def measure_layer(
    weight: Tensor,
    tensor: QuantizedTensor,
    *,
    layer: str,
    name: str,
    moments: Calibrated | None,
    seed: int,
    made: Made,
) -> LayerQuality:
    """All of `tensor` against `weight: [n, k]`; `seed` is that of Gaussian inputs.

    Raises TensorError for a weight that is no finite matrix of its shape, and for a calibration
    of another layer.
    """
    stages, of_int8 = usage(tensor), tensor.spec.codebook_dtype == "int8"
    inputs, outputs = _outputs(weight, tensor, moments, seed)
    measures = {
        **_bits(tensor),
        **dataclasses.asdict(
            distortion(weight, tensor, diagonal=moments.diagonal if moments else None)
        ),
        **outputs,
        "int8_cost": rounding_cost(weight, tensor) if of_int8 else None,
        "entropy_share": min(_evenness(one) for one in stages),
        "dead_entries": float(sum(one.dead for one in stages)),
    }
    tokens = measures.pop("tokens")
    assert tokens is not None
    return LayerQuality(
        layer=layer,
        tensor=name,
        n=tensor.n,
        k=tensor.k,
        format=changed_fields(tensor.spec),
        measures=measures,
        inputs=inputs,
        tokens=int(tokens),
        usage=tuple(_told(one) for one in stages),
        made=dict(made),
    )


def _outputs(
    weight: Tensor, tensor: QuantizedTensor, moments: Calibrated | None, seed: int
) -> tuple[Inputs, dict[str, float | None]]:
    """Errors of the outputs, by the best inputs that are known."""
    gram = None if moments is None else moments.gram
    run = None if gram is None else run_error(weight, tensor, gram)
    found: dict[str, float | None] = {
        "run_error": None if run is None else run.error,
        "run_cosine": None if run is None else run.cosine,
    }
    held_out = None if moments is None else moments.inputs
    if held_out is None and run is not None:
        none = dict.fromkeys(("output_cosine_low", "output_cosine_worst"))
        same = {"output_error": run.error, "output_cosine": run.cosine, "tokens": 0}
        return "run", found | same | none
    inputs = gaussian_inputs(tensor.k, seed=seed) if held_out is None else held_out
    one = output_error(weight, tensor, inputs)
    found |= {
        "output_error": one.error,
        "output_cosine": one.mean,
        "output_cosine_low": one.low,
        "output_cosine_worst": one.worst,
        "tokens": one.tokens,
    }
    return "gaussian" if held_out is None else "held-out", found


def _bits(tensor: QuantizedTensor) -> dict[str, float | None]:
    bits = tensor.bits
    return {
        "bits": bits.per_weight(),
        "index_bits": bits.index / bits.weights,
        "codebook_bits": bits.codebook / bits.weights,
        "side_bits": bits.side / bits.weights,
    }


def _evenness(one: CodeUsage) -> float:
    """Entropy over that of even use; a lone entry is used as evenly as can be."""
    return one.entropy_bits / one.even_bits if one.even_bits else 1.0


def _told(one: CodeUsage) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one),
        "histogram": list(one.histogram),
        "dead": one.dead,
        "perplexity": one.perplexity,
    }
