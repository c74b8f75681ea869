"""CTransPath, with its own weights or those of CHIEF: a Swin-T behind a convolutional stem, pooled.

The weights were saved by a patched timm of 2021; here they are renamed to the timm of today, which
needs no patch. CTransPath's own lie on a drive that can't be fetched by a program: put
`ctranspath.pth` into the folder that you pass as weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bagscope.features.encoders.builders import timm_trunk
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import hub_file, load_exactly, read_state_dict

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

CTRANSPATH = EncoderSpec(
    name="ctranspath",
    title="CTransPath",
    source="timm",
    architecture="swin_tiny_patch4_window7_224",
    builder_args={"stem": "convolutional"},
    weights_file="ctranspath.pth",
    input_px=224,
    interpolation="bilinear",
    pooling="output",
    dimension=768,
    tile_px=256,
    mpp=1.0,
    licence="GPL-3.0",
    commercial_use=True,
    gated=False,
    card="https://github.com/Xiyue-Wang/TransPath",
)
# What TRIDENT calls ctranspath has CHIEF's weights.
CHIEF = CTRANSPATH.model_copy(
    update={
        "name": "chief-ctranspath",
        "title": "CTransPath of CHIEF",
        "hub_id": "datasets/MahmoodLab/hest-bench",
        "weights_file": "fm_v1/ctranspath/CHIEF_CTransPath.pth",
        "licence": "AGPL-3.0",
        "card": "https://huggingface.co/datasets/MahmoodLab/hest-bench",
    }
)


@register_encoder(CTRANSPATH, CHIEF)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build timm's Swin-T and put the stem in."""
    from bagscope.features.encoders.networks import ConvStem

    network = timm_trunk(spec.architecture, {})
    network.patch_embed = ConvStem(network.embed_dim)  # type: ignore[arg-type]
    if not source.random:
        state = timm_swin_keys(read_state_dict(hub_file(spec, source), what=spec.name))
        # The head was called `head` where timm says `head.fc` today.
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        load_exactly(network, state, what=spec.name)
    return network


def timm_swin_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of an early Swin checkpoint to those of today's timm.

    Stages used to end with the downsampling that they begin with today; index tables and masks are
    computed and no longer stored.
    """
    if "layers.0.downsample.reduction.weight" not in state:
        return dict(state)
    renamed = {}
    for key, value in state.items():
        if "relative_position_index" in key or "attn_mask" in key:
            continue
        stage = re.match(r"layers\.(\d+)\.downsample\.", key)
        if stage:
            key = f"layers.{int(stage[1]) + 1}.downsample.{key[stage.end() :]}"
        renamed[key] = value
    return renamed
