"""Midnight-12k (Kaiko): the card classifies with the class token beside the mean of the patches.

Some tools keep the class token alone under the same name.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_dinov2
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import HALF, EncoderSpec

MIDNIGHT = EncoderSpec(
    name="midnight-12k",
    title="Midnight-12k",
    synonyms=("midnight",),
    source="transformers",
    architecture="Dinov2Model",
    builder_args={
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "patch_size": 14,
        "use_swiglu_ffn": True,
    },
    hub_id="kaiko-ai/midnight",
    input_px=224,
    interpolation="bilinear",
    mean=HALF,
    std=HALF,
    pooling="token+mean",
    prefix_tokens=1,
    dimension=3072,
    dtype="float16",
    tile_px=224,
    licence="MIT",
    commercial_use=True,
    gated=True,
    card="https://huggingface.co/kaiko-ai/midnight",
)
MIDNIGHT_CLS = MIDNIGHT.model_copy(
    update={
        "name": "midnight-12k-cls",
        "synonyms": ("midnight12k", "kaiko_midnight_12k"),
        "pooling": "token",
        "dimension": 1536,
    }
)

register_encoder(MIDNIGHT, MIDNIGHT_CLS)(build_dinov2)
