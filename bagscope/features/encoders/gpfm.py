"""GPFM (HKUST): DINOv2's large transformer, the class token."""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

GPFM = EncoderSpec(
    name="gpfm",
    title="GPFM",
    synonyms=("hkust_gpfm",),
    source="timm",
    architecture="vit_large_patch14_dinov2",
    builder_args={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
    hub_id="majiabo/GPFM",
    weights_file="GPFM.pth",
    input_px=224,
    pooling="token",
    prefix_tokens=1,
    dimension=1024,
    dtype="float16",
    tile_px=224,
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=False,
    card="https://huggingface.co/majiabo/GPFM",
)

register_encoder(GPFM)(build_timm)
