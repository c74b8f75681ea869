"""Virchow and Virchow2 (Paige): the class token beside the mean of the patch tokens, or alone.

The authors' embedding is the pair (2560); some tools keep the class token (1280) under the same
name. Virchow2 has four registers, which belong to neither part.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

_ARGS = {
    "img_size": 224,
    "init_values": 1e-5,
    "mlp_ratio": 5.3375,
    "global_pool": "",
    "mlp_layer": "SwiGLUPacked",
    "act_layer": "silu",
    "dynamic_img_size": True,
}

VIRCHOW = EncoderSpec(
    name="virchow",
    title="Virchow",
    synonyms=("virchow-full",),
    source="timm",
    architecture="vit_huge_patch14_224",
    builder_args=_ARGS,
    hub_id="paige-ai/Virchow",
    input_px=224,
    pooling="token+mean",
    prefix_tokens=1,
    dimension=2560,
    dtype="float16",
    tile_px=224,
    licence="Apache-2.0",
    commercial_use=True,
    gated=True,
    card="https://huggingface.co/paige-ai/Virchow",
)
VIRCHOW_CLS = VIRCHOW.model_copy(
    update={"name": "virchow-cls", "synonyms": (), "pooling": "token", "dimension": 1280}
)
VIRCHOW2 = VIRCHOW.model_copy(
    update={
        "name": "virchow2",
        "title": "Virchow2",
        "synonyms": (),
        "builder_args": {**_ARGS, "reg_tokens": 4},
        "hub_id": "paige-ai/Virchow2",
        "prefix_tokens": 5,
        "licence": "CC-BY-NC-ND-4.0",
        "commercial_use": False,
        "card": "https://huggingface.co/paige-ai/Virchow2",
    }
)
VIRCHOW2_CLS = VIRCHOW2.model_copy(
    update={
        "name": "virchow2-cls",
        "synonyms": ("paige_virchow2",),
        "pooling": "token",
        "dimension": 1280,
    }
)

register_encoder(VIRCHOW, VIRCHOW_CLS, VIRCHOW2, VIRCHOW2_CLS)(build_timm)
