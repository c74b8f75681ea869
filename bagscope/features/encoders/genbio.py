"""GenBio-PathFM: one class token per colour channel; the network is code of its repository."""

from __future__ import annotations

from bagscope.features.encoders.builders import build_remote
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

GENBIO_PATHFM = EncoderSpec(
    name="genbio-pathfm",
    title="GenBio-PathFM",
    source="remote-code",
    architecture="AutoModel",
    hub_id="genbio-ai/genbio-pathfm",
    input_px=224,
    interpolation="bilinear",
    mean=(0.697, 0.575, 0.728),
    std=(0.188, 0.240, 0.187),
    dimension=4608,
    dtype="bfloat16",
    tile_px=224,
    licence="GenBio AI Community License",
    commercial_use=False,
    gated=None,
    card="https://huggingface.co/genbio-ai/genbio-pathfm",
)

register_encoder(GENBIO_PATHFM)(build_remote)
