"""The ResNet-50 of ImageNet, cut after its third stage and averaged, as CLAM uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagscope.features.encoders.builders import timm_trunk, with_output
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import hub_file, load_exactly, read_state_dict

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

RESNET50_TRUNC = EncoderSpec(
    name="resnet50-trunc",
    title="ResNet-50 (ImageNet), truncated",
    synonyms=("resnet50", "resnet50_trunc"),
    source="timm",
    architecture="resnet50.tv_in1k",
    builder_args={"stages": 3},
    hub_id="timm/resnet50.tv_in1k",
    input_px=224,
    interpolation="bilinear",
    pooling="map",
    dimension=1024,
    licence="BSD-3-Clause",
    commercial_use=True,
    gated=False,
    card="https://huggingface.co/timm/resnet50.tv_in1k",
)


@register_encoder(RESNET50_TRUNC)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build and load the whole network, then take its last stage and its classifier away."""
    from torch import nn

    trunk = timm_trunk(spec.architecture, {"num_classes": 1000})
    if not source.random:
        load_exactly(trunk, read_state_dict(hub_file(spec, source), what=spec.name), what=spec.name)
    trunk.layer4 = nn.Identity()
    trunk.fc = nn.Identity()
    return with_output(trunk, spec)
