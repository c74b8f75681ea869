"""Prov-GigaPath's tile encoder: the centre of a tile of 256, as its authors take it.

Tools that resize the whole tile to 224 make another embedding.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

GIGAPATH = EncoderSpec(
    name="gigapath",
    title="Prov-GigaPath",
    synonyms=("prov_gigapath",),
    source="timm",
    architecture="vit_giant_patch14_dinov2",
    builder_args={
        "img_size": 224,
        "in_chans": 3,
        "patch_size": 16,
        "embed_dim": 1536,
        "depth": 40,
        "num_heads": 24,
        "mlp_ratio": 5.33334,
    },
    hub_id="prov-gigapath/prov-gigapath",
    weights_file="pytorch_model.bin",
    input_px=224,
    resize_px=256,
    pooling="token",
    prefix_tokens=1,
    dimension=1536,
    dtype="float16",
    # Apache 2.0 with conditions of use; one tool lists it as non-commercial.
    licence="Apache-2.0 with conditions",
    commercial_use=None,
    gated=True,
    card="https://huggingface.co/prov-gigapath/prov-gigapath",
)

register_encoder(GIGAPATH)(build_timm)
