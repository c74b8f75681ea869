"""Hopfield pooling, as its authors name the layers; what follows it is called `classifier`."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original

_CORE = "hopfield.association_core"

ORIGINALS: dict[str, Original] = {
    "hopfield-pooling": Original(
        aggregator="hopfield",
        layers={
            "pooling_weights": "states",
            "hopfield.norm_state_pattern": "norm_state",
            "hopfield.norm_stored_pattern": "norm_key",
            "hopfield.norm_pattern_projection": "norm_value",
            f"{_CORE}.in_proj_weight": "qkv.weight",
            f"{_CORE}.in_proj_bias": "qkv.bias",
            f"{_CORE}.out_proj": "out",
            "classifier": "classifier",
        },
    )
}
