"""PathOrchestra: a large vision transformer, the class token.

Its size is that of the paper (ViT-L/16); weights of another size are refused when they are loaded.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

PATHORCHESTRA = EncoderSpec(
    name="pathorchestra",
    title="PathOrchestra",
    synonyms=("path_orchestra",),
    source="timm",
    architecture="vit_large_patch16_224",
    builder_args={"init_values": 1e-5, "dynamic_img_size": False},
    hub_id="AI4Pathology/PathOrchestra",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=1,
    dimension=1024,
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/AI4Pathology/PathOrchestra",
)

register_encoder(PATHORCHESTRA)(build_timm)
