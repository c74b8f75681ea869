"""Phikon and Phikon-v2 (Owkin): the class token after the last norm.

Phikon resizes bilinearly, as its processor does. That of Phikon-v2 was not at hand: it is resized
bilinearly too, as TRIDENT does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagscope.features.encoders.builders import build_dinov2, load_transformers
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import hub_file, read_state_dict

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

PHIKON = EncoderSpec(
    name="phikon",
    title="Phikon",
    synonyms=("owkin_phikon",),
    source="transformers",
    architecture="ViTModel",
    builder_args={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 16,
        "image_size": 224,
    },
    hub_id="owkin/phikon",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=1,
    dimension=768,
    tile_px=224,
    licence="Owkin non-commercial",
    commercial_use=False,
    gated=False,
    card="https://huggingface.co/owkin/phikon",
)
PHIKON_V2 = EncoderSpec(
    name="phikon-v2",
    title="Phikon-v2",
    synonyms=("phikon_v2", "owkin_phikon_v2"),
    source="transformers",
    architecture="Dinov2Model",
    builder_args={
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
    },
    hub_id="owkin/phikon-v2",
    input_px=224,
    interpolation="bilinear",
    pooling="token",
    prefix_tokens=1,
    dimension=1024,
    tile_px=224,
    licence="Owkin non-commercial",
    commercial_use=False,
    gated=False,
    card="https://huggingface.co/owkin/phikon-v2",
)


@register_encoder(PHIKON)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build Phikon without the pooling layer, which was never trained."""
    from transformers import ViTConfig, ViTModel

    from bagscope.features.encoders.networks import Answer

    config = ViTConfig(**spec.builder_args)
    if source.random:
        return Answer(ViTModel(config, add_pooling_layer=False), "last_hidden_state")
    state = read_state_dict(hub_file(spec, source), what=spec.name)
    trained = {key: value for key, value in state.items() if not key.startswith("pooler.")}
    model = load_transformers(ViTModel, config, spec, trained, add_pooling_layer=False)
    return Answer(model, "last_hidden_state")


register_encoder(PHIKON_V2)(build_dinov2)
