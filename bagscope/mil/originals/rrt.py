"""RRT-MIL, as its authors name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original

_ENCODER = "online_encoder"
_LAYERS = 8
"""As many layers of theirs are known by their number; they publish one."""

ORIGINALS: dict[str, Original] = {
    "rrt": Original(
        aggregator="rrt",
        layers={
            "patch_to_emb.0": "projection",
            f"{_ENCODER}.layers.*.norm": "norms.*",
            f"{_ENCODER}.layers.*.attn.attn.qkv": "mixers.*.qkv",
            f"{_ENCODER}.layers.*.attn.attn.proj": "mixers.*.proj",
            f"{_ENCODER}.layers.*.attn.attn.pe.weight": "mixers.*.epeg",
            f"{_ENCODER}.cr_msa.norm": "cross_norm",
            f"{_ENCODER}.cr_msa.attn.attn.qkv": "cross.qkv",
            f"{_ENCODER}.cr_msa.attn.attn.proj": "cross.proj",
            f"{_ENCODER}.cr_msa.attn.phi": "cross.phi",
            f"{_ENCODER}.norm": "norm",
            "pool_fn.attention.attention.0": "v",
            "pool_fn.attention.attention.2": "w",
            "predictor": "classifier",
        },
        options={"faithful_pads": True},
        # The same number is added to a tile's logits for all others: it changes no softmax.
        left_out=frozenset(
            f"{_ENCODER}.layers.{layer}.attn.attn.pe.bias" for layer in range(_LAYERS)
        ),
    )
}
