"""MUSK: the image side of a BEiT-3, built by its authors' package, without its head.

`musk` sees the tile at one scale (1024), `musk-ms` at several, as the authors do for slides (2048).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import HALF, EncoderSpec
from bagscope.features.encoders.weights import hub_file, load_exactly, read_state_dict

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

MUSK = EncoderSpec(
    name="musk",
    title="MUSK",
    source="package",
    architecture="musk.modeling",
    builder_args={"model": "musk_large_patch16_384", "with_head": False, "ms_aug": False},
    hub_id="xiangjx/musk",
    package="git+https://github.com/lilab-stanford/MUSK.git",
    input_px=384,
    mean=HALF,
    std=HALF,
    dimension=1024,
    dtype="float16",
    tile_px=384,
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/xiangjx/musk",
)
MUSK_MS = MUSK.model_copy(
    update={
        "name": "musk-ms",
        "title": "MUSK, several scales",
        "builder_args": {**MUSK.builder_args, "ms_aug": True},
        "dimension": 2048,
    }
)


@register_encoder(MUSK, MUSK_MS)
def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the network, which the package registers with timm when it is imported."""
    import timm

    from bagscope.features.encoders.networks import Musk

    import_module(spec.architecture)
    args = dict(spec.builder_args)
    model = timm.create_model(args.pop("model"))
    if not source.random:
        load_exactly(model, read_state_dict(hub_file(spec, source), what=spec.name), what=spec.name)
    return Musk(model, args)
