from __future__ import annotations

import pytest

from vqkernels.parallel import axis_of


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.layers.0.self_attn.q_proj", "row"),
        ("model.layers.0.self_attn.o_proj", "column"),
        ("model.layers.0.self_attn.o_proj.weight", "column"),
        ("model.layers.11.mlp.down_proj", "column"),
        ("model.layers.11.mlp.gate_up_proj", "row"),
        ("model.decoder.layers.3.self_attn.out_proj", "column"),
        ("model.decoder.layers.3.fc1", "row"),
        ("model.decoder.layers.3.fc2", "column"),
        ("layers.0.feed_forward.w1", "row"),
        ("layers.0.feed_forward.w2", "column"),
        ("layers.0.attention.wo", "column"),
        ("transformer.h.0.attn.c_proj", "column"),
        ("gpt_neox.layers.0.attention.dense", "column"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", "column"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", "row"),
        ("encoder.layer.5.attention.output.dense.weight", "column"),
        ("encoder.layer.5.output.dense.weight", "column"),
        ("encoder.layer.5.intermediate.dense.weight", "row"),
        ("5.output", "column"),
        ("5.attention_output", "column"),
        ("output", "row"),
        ("lm_head", "row"),
        ("", "row"),
    ],
)
def test_axis_of(name: str, axis: str) -> None:
    assert axis_of(name) == axis
