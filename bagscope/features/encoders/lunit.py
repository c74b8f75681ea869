"""Lunit's self-supervised benchmark: DINO transformers (class token) and ResNet-50s (pooled).

Normalised with the constants of Lunit's own tiles; a tool that takes ImageNet's makes another
embedding.
"""

from __future__ import annotations

from typing import Any

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec


def _spec(name: str, title: str, hub_id: str, **facts: Any) -> EncoderSpec:
    return EncoderSpec(
        name=name,
        title=title,
        source="timm",
        hub_id=f"1aurent/{hub_id}",
        input_px=224,
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
        tile_px=224,
        licence="Lunit non-commercial",
        commercial_use=False,
        gated=False,
        card=f"https://huggingface.co/1aurent/{hub_id}",
        **facts,
    )


def _transformer(patch_px: int) -> EncoderSpec:
    architecture = f"vit_small_patch{patch_px}_224"
    return _spec(
        f"lunit-vits{patch_px}",
        f"Lunit DINO ViT-S/{patch_px}",
        f"{architecture}.lunit_dino",
        synonyms=(f"lunit-dino-s{patch_px}", f"lunit_vits{patch_px}"),
        architecture=architecture,
        builder_args={"img_size": 224, "dynamic_img_size": True},
        pooling="token",
        prefix_tokens=1,
        dimension=384,
    )


def _resnet(method: str, title: str) -> EncoderSpec:
    return _spec(
        f"lunit-resnet50-{method}",
        f"Lunit {title} ResNet-50",
        f"resnet50.lunit_{method}",
        synonyms=(f"lunit-{method}",),
        architecture="resnet50",
        pooling="output",
        dimension=2048,
    )


register_encoder(
    _transformer(8),
    _transformer(16),
    _resnet("bt", "Barlow Twins"),
    _resnet("mocov2", "MoCo v2"),
    _resnet("swav", "SwAV"),
)(build_timm)
