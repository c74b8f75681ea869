"""DINOv2 and DINOv3 (Meta), trained on photographs: the baselines that need no permission.

DINOv2 was tuned at 518 pixels; like most of pathology it is fed 224 here, for which timm resamples
its positions. DINOv3 has none to resample and sees 256, as timm states.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

_V2 = {"s": ("small", 384), "b": ("base", 768), "l": ("large", 1024), "g": ("giant", 1536)}
_V3 = {
    "s": ("small", 384),
    "splus": ("small_plus", 384),
    "b": ("base", 768),
    "l": ("large", 1024),
    "hplus": ("huge_plus", 1280),
    "7b": ("7b", 4096),
}


def _dinov2(short: str, size: str, dimension: int, *, registers: bool) -> EncoderSpec:
    architecture = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2.lvd142m"
    return EncoderSpec(
        name=f"dinov2-vit{short}14{'-reg' if registers else ''}",
        title=f"DINOv2 ViT-{short.upper()}/14{' with registers' if registers else ''}",
        synonyms=(f"dinov2_vit{short}14{'_reg' if registers else ''}",),
        source="timm",
        architecture=architecture,
        builder_args={"img_size": 518, "dynamic_img_size": True},
        hub_id=f"timm/{architecture}",
        input_px=224,
        pooling="token",
        prefix_tokens=5 if registers else 1,
        dimension=dimension,
        licence="Apache-2.0",
        commercial_use=True,
        gated=False,
        card=f"https://huggingface.co/timm/{architecture}",
    )


def _dinov3(short: str, size: str, dimension: int) -> EncoderSpec:
    architecture = f"vit_{size}_patch16_dinov3.lvd1689m"
    vit = f"vit{short}"
    return EncoderSpec(
        name=f"dinov3-{vit}16",
        title=f"DINOv3 ViT-{short.replace('plus', '+').upper()}/16",
        synonyms=(f"dinov3_{vit}16",),
        source="timm",
        architecture=architecture,
        hub_id=f"timm/{architecture}",
        input_px=256,
        pooling="token",
        prefix_tokens=5,
        dimension=dimension,
        licence="DINOv3 License",
        commercial_use=None,
        gated=None,
        card=f"https://huggingface.co/timm/{architecture}",
    )


register_encoder(
    *(_dinov2(short, *facts, registers=False) for short, facts in _V2.items()),
    *(_dinov2(short, *facts, registers=True) for short, facts in _V2.items()),
    *(_dinov3(short, *facts) for short, facts in _V3.items()),
)(build_timm)
