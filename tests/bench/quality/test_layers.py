"""What is measured of a layer, and on which inputs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench.quality.layers import LayerQuality, measure_layer
from bench.quality.measures import MEASURES, total
from tests.bench.quality.models import QUERY, SPEC, Moments, dense, inputs, quantised
from vqkernels.errors import TensorError
from vqkernels.quality import distortion, gaussian_inputs, output_error, run_error, usage


def measured(moments: Moments | None, seed: int = 3) -> LayerQuality:
    return measure_layer(
        dense()[QUERY],
        quantised()[QUERY],
        layer="0.query",
        name=QUERY,
        moments=moments,
        seed=seed,
        made={"seed": 1},
    )


def test_without_a_calibration_outputs_are_of_gaussian_inputs() -> None:
    found, weight, tensor = measured(None), dense()[QUERY], quantised()[QUERY]
    assert (found.layer, found.tensor, found.n, found.k) == ("0.query", QUERY, 24, 32)
    assert (found.weights, found.made) == (24 * 32, {"seed": 1})
    assert found.format == {
        "method": "rq",
        "vector_length": 4,
        "stages": [16, 8],
        "scale_axis": "row",
    }
    assert set(found.measures) == set(MEASURES)
    errors = distortion(weight, tensor)
    for name in ("mse", "relative_error", "cosine", "max_error"):
        assert found.measures[name] == getattr(errors, name)
    outputs = output_error(weight, tensor, gaussian_inputs(32, seed=3))
    assert (found.inputs, found.tokens) == ("gaussian", 256)
    assert _outputs(found) == [outputs.error, outputs.mean, outputs.low, outputs.worst]
    assert _outputs(measured(None, seed=4)) != _outputs(found)
    for name in ("weighted_error", "run_error", "run_cosine"):
        assert found.measures[name] is None


def test_held_out_inputs_are_judged_where_there_are_some() -> None:
    weight, tensor, x = dense()[QUERY], quantised()[QUERY], inputs(32)
    gram, held_out = x.T @ x / len(x), inputs(32, tokens=20)
    found = measured(Moments(gram.diagonal(), gram, held_out))
    outputs = output_error(weight, tensor, held_out)
    assert (found.inputs, found.tokens) == ("held-out", 20)
    assert _outputs(found) == [outputs.error, outputs.mean, outputs.low, outputs.worst]
    run = run_error(weight, tensor, gram)
    assert (found.measures["run_error"], found.measures["run_cosine"]) == (run.error, run.cosine)
    weighted = distortion(weight, tensor, diagonal=gram.diagonal()).weighted_error
    assert found.measures["weighted_error"] == weighted


def test_without_held_out_inputs_the_run_is_judged_by_its_gram() -> None:
    x = inputs(32)
    gram = x.T @ x / len(x)
    found = measured(Moments(gram.diagonal(), gram))
    run = run_error(dense()[QUERY], quantised()[QUERY], gram)
    assert (found.inputs, found.tokens) == ("run", 0)
    assert _outputs(found) == [run.error, run.cosine, None, None]
    # a diagonal alone says nothing of outputs
    found = measured(Moments(gram.diagonal()))
    assert (found.inputs, found.measures["run_error"]) == ("gaussian", None)
    assert found.measures["weighted_error"] is not None


def test_codes_are_summed_up_over_stages() -> None:
    tensor, found = quantised()[QUERY], measured(None)
    assert [dict(stage) for stage in found.usage] == [
        {
            **dataclasses.asdict(one),
            "histogram": list(one.histogram),
            "dead": one.dead,
            "perplexity": one.perplexity,
        }
        for one in usage(tensor)
    ]
    evenness = [one.entropy_bits / one.even_bits for one in usage(tensor)]
    assert found.measures["entropy_share"] == min(evenness) != max(evenness)
    assert found.measures["dead_entries"] == 0
    codes = torch.zeros_like(tensor.parts["codes"])
    dead = measure_layer(
        dense()[QUERY],
        tensor.replace_parts(codes=codes),
        layer="x",
        name=QUERY,
        moments=None,
        seed=0,
        made={},
    )
    assert dead.measures["dead_entries"] == 15 + 7
    assert dead.measures["entropy_share"] == 0
    bits = tensor.bits
    assert found.measures["bits"] == bits.per_weight()
    parts = [found.measures[f"{part}_bits"] for part in ("index", "codebook", "side")]
    assert sum(part or 0 for part in parts) == pytest.approx(bits.per_weight())
    assert SPEC.scale_axis == "row"
    assert parts[2] == 16 / 32


def test_a_calibration_of_another_layer_is_refused() -> None:
    with pytest.raises(TensorError, match=r"diagonal: shape \[31\]"):
        measured(Moments(torch.ones(31)))
    with pytest.raises(TensorError, match=r"inputs: shape \[4, 31\]"):
        measured(Moments(torch.ones(32), inputs=torch.ones(4, 31)))


def test_totals_weigh_layers_by_their_weights() -> None:
    layers = [
        (100, {"mse": 1.0, "max_error": 5.0, "dead_entries": 3.0, "output_cosine_worst": 0.9}),
        (300, {"mse": 2.0, "max_error": 4.0, "dead_entries": 4.0, "output_cosine_worst": 0.8}),
        (600, {"mse": None, "max_error": 1.0, "dead_entries": 0.0, "output_cosine_worst": None}),
    ]
    assert total("mse", layers) == (100 * 1 + 300 * 2) / 400
    assert total("max_error", layers) == 5
    assert total("dead_entries", layers) == 7
    assert total("output_cosine_worst", layers) == 0.8
    assert total("run_error", layers) is None
    assert total("mse", [(1, {"mse": math.inf})]) == math.inf


def _outputs(found: LayerQuality) -> list[float | None]:
    names = ("output_error", "output_cosine", "output_cosine_low", "output_cosine_worst")
    return [found.measures[name] for name in names]
