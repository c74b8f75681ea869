"""PLIP and QuiltNet: image towers of CLIP, the vector in the space shared with text, unscaled.

QuiltNet's towers are open_clip's with its plain GELU. OpenAI's CLIP, from which they were trained
on, has another activation; which one the authors kept could not be looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagscope.features.encoders.builders import load_transformers
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import CLIP_MEAN, CLIP_STD, EncoderSpec
from bagscope.features.encoders.weights import hub_file, load_exactly, read_state_dict

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

PLIP = EncoderSpec(
    name="plip",
    title="PLIP",
    source="transformers",
    architecture="CLIPVisionModelWithProjection",
    builder_args={"patch_size": 32, "projection_dim": 512},
    hub_id="vinid/plip",
    input_px=224,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    dimension=512,
    tile_px=224,
    licence="non-commercial",
    commercial_use=False,
    gated=False,
    card="https://huggingface.co/vinid/plip",
)


def _quiltnet(short: str, patch_px: int, repository: str) -> EncoderSpec:
    return EncoderSpec(
        name=f"quiltnet-{short}",
        title=repository,
        source="open_clip",
        architecture="VisionTransformer",
        builder_args={
            "image_size": 224,
            "patch_size": patch_px,
            "width": 768,
            "layers": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "output_dim": 512,
        },
        hub_id=f"wisdomik/{repository}",
        weights_file="open_clip_pytorch_model.bin",
        input_px=224,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        dimension=512,
        tile_px=224,
        licence="MIT",
        commercial_use=True,
        gated=False,
        card=f"https://huggingface.co/wisdomik/{repository}",
    )


QUILTNET_B32 = _quiltnet("b32", 32, "QuiltNet-B-32")
QUILTNET_B16 = _quiltnet("b16", 16, "QuiltNet-B-16")
QUILTNET_B16_PMB = _quiltnet("b16-pmb", 16, "QuiltNet-B-16-PMB")


@register_encoder(PLIP)
def build_plip(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the image tower with its projection; the text tower of the checkpoint is left."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from bagscope.features.encoders.networks import Answer

    config = CLIPVisionConfig(**spec.builder_args)
    if source.random:
        return Answer(CLIPVisionModelWithProjection(config), "image_embeds")
    state = read_state_dict(hub_file(spec, source), what=spec.name)
    tower = {
        key: value
        for key, value in state.items()
        # Older checkpoints store the row numbers of the positions.
        if key.startswith(("vision_model.", "visual_projection."))
        and not key.endswith("position_ids")
    }
    model = load_transformers(CLIPVisionModelWithProjection, config, spec, tower)
    return Answer(model, "image_embeds")


@register_encoder(QUILTNET_B32, QUILTNET_B16, QUILTNET_B16_PMB)
def build_quiltnet(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build open_clip's image tower; the text tower of the checkpoint is left."""
    from open_clip.transformer import (  # type: ignore[import-untyped]
        VisionTransformer,
    )

    network: nn.Module = VisionTransformer(**spec.builder_args)
    if not source.random:
        state = read_state_dict(hub_file(spec, source), what=spec.name)
        prefix = "visual."
        tower = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        load_exactly(network, tower, what=spec.name)
    return network
