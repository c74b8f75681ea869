"""CONCH v1 (a package of its authors) and CONCH v1.5 (code in the repository of TITAN).

CONCH v1 is the embedding before the projection into the space of text, not normalised, as its
authors recommend for slides; a tool that takes it after the projection makes another encoder of the
same width.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import CLIP_MEAN, CLIP_STD, EncoderSpec
from bagscope.features.encoders.weights import hub_file, hub_folder

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

CONCH_V1 = EncoderSpec(
    name="conch-v1",
    title="CONCH v1",
    synonyms=("conch_v1", "conch"),
    source="package",
    architecture="conch.open_clip_custom",
    builder_args={"model": "conch_ViT-B-16", "proj_contrast": False, "normalize": False},
    hub_id="MahmoodLab/conch",
    weights_file="pytorch_model.bin",
    package="git+https://github.com/Mahmoodlab/CONCH.git",
    input_px=448,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    dimension=512,
    tile_px=512,
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/MahmoodLab/CONCH",
)
CONCH_V15 = EncoderSpec(
    name="conch-v1.5",
    title="CONCH v1.5",
    synonyms=("conch_v15", "conch1_5", "conch_v1_5"),
    source="remote-code",
    architecture="AutoModel.return_conch",
    hub_id="MahmoodLab/TITAN",
    input_px=448,
    interpolation="bilinear",
    dimension=768,
    dtype="float16",
    tile_px=512,
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/MahmoodLab/TITAN",
)


@register_encoder(CONCH_V1)
def build_v1(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the image tower with the authors' package."""
    from bagscope.features.encoders.networks import Method

    factory = import_module(spec.architecture)
    args = dict(spec.builder_args)
    # Their loader takes a path, and knows no network without weights.
    path = str(hub_file(spec, source))
    model = factory.create_model_from_pretrained(args.pop("model"), path, return_transform=False)
    return Method(model, "encode_image", args)


@register_encoder(CONCH_V15)
def build_v15(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Take the tile encoder out of TITAN, whose repository holds both."""
    from transformers import AutoModel

    titan = AutoModel.from_pretrained(str(hub_folder(spec, source)), trust_remote_code=True)
    network: nn.Module = titan.return_conch()[0]
    return network
