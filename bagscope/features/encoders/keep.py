"""KEEP: a large vision transformer with a projection head, scaled to length 1.

Its repository brings code of its own; the image side is timm's transformer and two linear layers,
so it is built here without running that code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagscope.features.encoders.builders import timm_trunk
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import hub_file, load_exactly, read_state_dict

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

KEEP = EncoderSpec(
    name="keep",
    title="KEEP",
    source="timm",
    architecture="vit_large_patch16_224",
    builder_args={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
    hub_id="Astaxanthin/KEEP",
    weights_file="model.safetensors",
    input_px=224,
    pooling="output",
    normalise=True,
    dimension=768,
    dtype="float16",
    licence="MIT",
    commercial_use=True,
    gated=False,
    card="https://huggingface.co/Astaxanthin/KEEP",
)


@register_encoder(KEEP)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the image side; the text side of the checkpoint is left."""
    from torch import nn

    from bagscope.features.encoders.networks import Headed

    trunk = timm_trunk(spec.architecture, spec.builder_args, to_be_loaded=not source.random)
    head = nn.Sequential(
        nn.Linear(1024, spec.dimension), nn.GELU(), nn.Linear(spec.dimension, spec.dimension)
    )
    network = Headed(trunk, head)
    if source.random:
        return network
    state = {}
    for key, value in read_state_dict(hub_file(spec, source), what=spec.name).items():
        if key.startswith(("visual.", "visual_head.")):
            # transformers renames every `gamma` when it saves, the layer scale's too.
            scale = key.endswith((".ls1.weight", ".ls2.weight"))
            state[key.removesuffix("weight") + "gamma" if scale else key] = value
    load_exactly(network, state, what=spec.name)
    return network
