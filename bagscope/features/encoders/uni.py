"""UNI and UNI2-h (Mahmood Lab): vision transformers trained with DINOv2, the class token.

Their authors resize to 224 bilinearly and crop nothing; other tools resize bicubically.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

UNI = EncoderSpec(
    name="uni",
    title="UNI",
    synonyms=("uni_v1", "mahmood_uni"),
    source="timm",
    architecture="vit_large_patch16_224",
    builder_args={"init_values": 1e-5, "dynamic_img_size": True},
    hub_id="MahmoodLab/uni",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=1,
    dimension=1024,
    dtype="float16",
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/MahmoodLab/uni",
)
UNI2_H = EncoderSpec(
    name="uni2-h",
    title="UNI2-h",
    synonyms=("uni_v2", "uni2", "mahmood_uni2_h"),
    source="timm",
    architecture="vit_giant_patch14_224",
    builder_args={
        "img_size": 224,
        "patch_size": 14,
        "depth": 24,
        "num_heads": 24,
        "init_values": 1e-5,
        "embed_dim": 1536,
        "mlp_ratio": 2.66667 * 2,
        "no_embed_class": True,
        "mlp_layer": "SwiGLUPacked",
        "act_layer": "silu",
        "reg_tokens": 8,
        "dynamic_img_size": True,
    },
    hub_id="MahmoodLab/UNI2-h",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=9,
    dimension=1536,
    dtype="bfloat16",
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/MahmoodLab/UNI2-h",
)

register_encoder(UNI, UNI2_H)(build_timm)
