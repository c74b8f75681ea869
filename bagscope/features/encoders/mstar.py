"""mSTAR: UNI's architecture trained on with reports and gene expression, the class token."""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

MSTAR = EncoderSpec(
    name="mstar",
    title="mSTAR",
    source="timm",
    architecture="vit_large_patch16_224",
    builder_args={"init_values": 1e-5, "dynamic_img_size": True},
    hub_id="Wangyh/mSTAR",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=1,
    dimension=1024,
    licence="",
    commercial_use=None,
    gated=None,
    card="https://huggingface.co/Wangyh/mSTAR",
)

register_encoder(MSTAR)(build_timm)
