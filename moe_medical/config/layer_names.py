"""What linear layers are called in the models of transformers: one table, for whoever tells them apart.

A model with other names works all the same; it is only estimated less exactly.
"""

from __future__ import annotations

SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Sibling layers that read the same tensor."""

CLOSING = frozenset(
    ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h")
)
"""Last layers of attention or FFN: they read what the others have made, which is as wide as what is kept."""

RUN_ORDER = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "query_key_value", "c_attn", "qkv_proj", "wqkv"),
    *("o_proj", "out_proj", "dense", "attn.c_proj", "attention.wo"),
    *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "wi_0", "wi_1", "c_fc", "fc1", "fc_in"),
    *("dense_h_to_4h", "down_proj", "w2", "wo", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h"),
)
"""Layers of a block in the order in which they run; a dotted name goes before the plain one it ends in."""


def is_closing(name: str) -> bool:
    """Whether a full module name is that of a closing layer."""
    return name.rpartition(".")[2] in CLOSING
