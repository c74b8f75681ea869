"""H-optimus-0, H-optimus-1 and H0-mini (Bioptimus): giant and base transformers with registers.

The cards of H-optimus feed tiles of 224 as they are; tiles of another size are resized bilinearly
here, as most tools do. H0-mini's card gives both its embeddings: the class token, and the pair with
the mean of the patch tokens. Its constants are those of H-optimus, as in its card's transform.
"""

from __future__ import annotations

from bagscope.features.encoders.builders import build_timm
from bagscope.features.encoders.registry import register_encoder
from bagscope.features.encoders.spec import EncoderSpec

_MEAN = (0.707223, 0.578729, 0.703617)
_STD = (0.211883, 0.230117, 0.177517)

H_OPTIMUS_0 = EncoderSpec(
    name="h-optimus-0",
    title="H-optimus-0",
    synonyms=("hoptimus0", "bioptimus_h_optimus_0"),
    source="timm",
    architecture="vit_giant_patch14_reg4_dinov2",
    builder_args={"img_size": 224, "init_values": 1e-5, "global_pool": "token"},
    hub_id="bioptimus/H-optimus-0",
    input_px=224,
    interpolation="bilinear",
    mean=_MEAN,
    std=_STD,
    pooling="token",
    prefix_tokens=5,
    dimension=1536,
    dtype="float16",
    tile_px=224,
    licence="Apache-2.0",
    commercial_use=True,
    gated=None,
    card="https://huggingface.co/bioptimus/H-optimus-0",
)
H_OPTIMUS_1 = H_OPTIMUS_0.model_copy(
    update={
        "name": "h-optimus-1",
        "title": "H-optimus-1",
        "synonyms": ("hoptimus1",),
        "hub_id": "bioptimus/H-optimus-1",
        "licence": "CC-BY-NC-ND-4.0",
        "commercial_use": False,
        "gated": True,
        "card": "https://huggingface.co/bioptimus/H-optimus-1",
    }
)
H0_MINI = EncoderSpec(
    name="h0-mini",
    title="H0-mini",
    synonyms=("bioptimus_h0_mini",),
    source="timm",
    architecture="vit_base_patch14_reg4_dinov2",
    builder_args={
        "img_size": 224,
        "init_values": 1e-5,
        # 86 M parameters on the card: the gated MLP is as wide as that of the giant ones.
        "mlp_ratio": 2.66667 * 2,
        "mlp_layer": "SwiGLUPacked",
        "act_layer": "silu",
        "global_pool": "",
    },
    hub_id="bioptimus/H0-mini",
    input_px=224,
    mean=_MEAN,
    std=_STD,
    pooling="token",
    prefix_tokens=5,
    dimension=768,
    dtype="float16",
    tile_px=224,
    licence="CC-BY-NC-ND-4.0",
    commercial_use=False,
    gated=True,
    card="https://huggingface.co/bioptimus/H0-mini",
)
H0_MINI_PAIR = H0_MINI.model_copy(
    update={
        "name": "h0-mini-cls-mean",
        "synonyms": (),
        "pooling": "token+mean",
        "dimension": 1536,
    }
)

register_encoder(H_OPTIMUS_0, H_OPTIMUS_1, H0_MINI, H0_MINI_PAIR)(build_timm)
