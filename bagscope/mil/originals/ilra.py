"""ILRA, as the authors of ACMIL, who ship it, name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original

_LAYERS = {
    "fc_q": "query",
    "fc_k": "key",
    "fc_v": "value",
    "multihead_attn.in_proj_weight": "inner.weight",
    "multihead_attn.in_proj_bias": "inner.bias",
    "multihead_attn.out_proj": "inner_out",
    "fc_o": "out",
    "gate.0": "gate",
    "ln0": "norm_first",
    "ln1": "norm_last",
}


def _block(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{own}" for name, own in _LAYERS.items()}


ORIGINALS: dict[str, Original] = {
    "ilra": Original(
        aggregator="ilra",
        layers={
            "gab_blocks.*.latent": "blocks.*.latent",
            **_block("gab_blocks.*.project_forward", "blocks.*.forth"),
            **_block("gab_blocks.*.project_backward", "blocks.*.back"),
            "pooling.S": "seeds",
            **_block("pooling.mha", "pooling"),
            "classifier": "classifier",
        },
    )
}
