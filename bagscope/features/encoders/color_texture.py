"""Colour and texture statistics: an encoder without weights, for smoke runs and as a baseline.

The tile's optical density is split into haematoxylin, eosin and a remainder with the fixed stain
vectors of Ruifrok and Johnston (Anal Quant Cytol Histol 2001). The vector holds, in this order:

colour      for saturation, brightness, haematoxylin, eosin, remainder: how the pixels are spread
            over six ranges, and the standard deviation; and how haematoxylin goes with the others
texture     of brightness and haematoxylin, at several halvings of the resolution: how steps between
            neighbours and the deviation in squares of 4 × 4 pixels are spread over four ranges; and
            how often a pixel stands above 1, 2, 3, 4 of its neighbours (a local binary pattern that
            doesn't know directions)
bands       of brightness, haematoxylin and eosin: the standard deviation that is lost with each
            halving of the resolution, which shows how large the structures are

How values are spread over a range lo ... hi is mean(clip((x − lo) / (hi − lo), 0, 1)): a histogram
without jumps. All pixel values are whole numbers small enough for their sums to be exact in
float32, so that a vector has the same bytes in any batch, on any number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource

if TYPE_CHECKING:
    from torch import nn

SPEC = EncoderSpec(
    name="color-texture",
    title="Stain-separated colour and texture statistics",
    source="bagscope",
    architecture="color_texture",
    builder_args={"version": 1},
    input_px=128,
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    pooling="output",
    dimension=126,
    dtype="float32",
    tile_px=256,
    mpp=0.5,
    licence="Apache-2.0",
    commercial_use=True,
    gated=False,
    run_here=True,
)


@register_encoder(SPEC)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the network; it has no weights, so that it needs no source."""
    from bagscope.features.encoders.color_texture_network import ColorTexture

    return ColorTexture()
