"""Hibou-B and Hibou-L (HistAI): networks in code of their repository, the pooled output."""

from __future__ import annotations

from bagscope.features.encoders.builders import build_remote
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

HIBOU_B = EncoderSpec(
    name="hibou-b",
    title="Hibou-B",
    synonyms=("histai_hibou_b",),
    source="remote-code",
    architecture="AutoModel",
    builder_args={"output": "pooler_output"},
    hub_id="histai/hibou-b",
    input_px=224,
    mean=(0.7068, 0.5755, 0.722),
    std=(0.195, 0.2316, 0.1816),
    dimension=768,
    tile_px=224,
    licence="Apache-2.0",
    commercial_use=True,
    gated=True,
    card="https://huggingface.co/histai/hibou-b",
)
HIBOU_L = HIBOU_B.model_copy(
    update={
        "name": "hibou-l",
        "title": "Hibou-L",
        "synonyms": ("hibou_l", "histai_hibou_l"),
        "hub_id": "histai/hibou-L",
        "dimension": 1024,
        "card": "https://huggingface.co/histai/hibou-L",
    }
)

register_encoder(HIBOU_B, HIBOU_L)(build_remote)
