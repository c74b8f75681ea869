"""Kaiko's "towards large pathology foundation models": five vision transformers, the class token.

L/14 has positions for 518 pixels, which timm resamples to the 224 that it is fed.
"""

from __future__ import annotations

from typing import Any

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import HALF, EncoderSpec


def _spec(
    short: str, architecture: str, dimension: int, prefix_tokens: int, **builder_args: Any
) -> EncoderSpec:
    hub_id = f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms"
    return EncoderSpec(
        name=f"kaiko-{short}",
        title=f"Kaiko ViT-{short[3].upper()}/{short[4:]}",
        synonyms=(f"kaiko_{short}",),
        source="timm",
        architecture=architecture,
        builder_args={"dynamic_img_size": True, **builder_args},
        hub_id=hub_id,
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="token",
        prefix_tokens=prefix_tokens,
        dimension=dimension,
        card=f"https://huggingface.co/{hub_id}",
    )


VITS8 = _spec("vits8", "vit_small_patch8_224", 384, 1, img_size=224)
VITS16 = _spec("vits16", "vit_small_patch16_224", 384, 1, img_size=224)
VITB8 = _spec("vitb8", "vit_base_patch8_224", 768, 1, img_size=224)
VITB16 = _spec("vitb16", "vit_base_patch16_224", 768, 1, img_size=224)
VITL14 = _spec("vitl14", "vit_large_patch14_reg4_dinov2", 1024, 5, img_size=518)

register_encoder(VITS8, VITS16, VITB8, VITB16, VITL14)(build_timm)
