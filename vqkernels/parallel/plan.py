"""Which way each matrix of a transformer is cut, by its name: Megatron-LM's plan.

What reads the hidden state (q, k, v, gate, up) is cut by row, what writes it back (o, down) by
column, so that a rank's rows of the first are the columns that its share of the second takes:
one sum over the ranks (all-reduce) for attention and one for the MLP.
"""

from __future__ import annotations

from vqkernels.parallel.slices import SplitAxis

__all__ = ["axis_of"]

# What models call the projection back to the hidden state.
_COLUMN = {
    "attention_output",
    "c_proj",
    "dense_4h_to_h",
    "down_proj",
    "fc2",
    "o_proj",
    "out_proj",
    "w2",
    "wo",
}

# `dense` is that projection under these (BERT, GPT-NeoX, Falcon); `intermediate.dense` is not.
_OWNERS_OF_DENSE = {"attention", "output", "self_attention", "self_attn"}


def axis_of(name: str) -> SplitAxis:
    """How a model's matrix `name` is cut, with or without `.weight`; unknown names by row.

    Either way is right for any matrix; the plan only saves exchanges between ranks. Rows of a
    fused matrix (qkv_proj) are cut as one, across q, k and v: split the three, and fuse then.
    """
    *owners, last = name.removesuffix(".weight").split(".")
    owner = owners[-1] if owners else ""
    # an `output` that nothing owns is a language model's head
    back = last in _COLUMN or (last == "output" and owner != "")
    return "column" if back or (last == "dense" and owner in _OWNERS_OF_DENSE) else "row"
