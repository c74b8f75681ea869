"""OpenMidnight (Sophont): DINOv2's giant transformer with registers, the class token."""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

OPENMIDNIGHT = EncoderSpec(
    name="openmidnight",
    title="OpenMidnight",
    synonyms=("open-midnight",),
    source="timm",
    architecture="vit_giant_patch14_reg4_dinov2",
    builder_args={"img_size": 224},
    hub_id="SophontAI/OpenMidnight",
    weights_file="teacher_checkpoint_load.pt",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=5,
    dimension=1536,
    dtype="float16",
    tile_px=224,
    licence="Apache-2.0",
    commercial_use=True,
    gated=True,
    card="https://huggingface.co/SophontAI/OpenMidnight",
)

register_encoder(OPENMIDNIGHT)(build_timm)
