"""How networks are built from facts: one way for timm, one for transformers, one for remote code.

Families register these functions, so nothing heavy is imported before a network is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bagscope.errors import EncoderUnavailable
from bagscope.features.encoders.weights import (
    SHOWN_KEYS,
    hub_file,
    hub_folder,
    load_exactly,
    read_state_dict,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bagscope.features.encoders.spec import EncoderSpec
    from bagscope.features.encoders.weights import WeightSource

_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
_TOKENS = "last_hidden_state"


def timm_trunk(
    architecture: str, builder_args: Mapping[str, Any], *, to_be_loaded: bool = False
) -> nn.Module:
    """Create a timm network with random weights; layers may be given by their names.

    Drawing the weights of a giant transformer takes minutes; where they are loaded afterwards
    (`to_be_loaded`), a vision transformer is left without.
    """
    import timm
    import torch
    from timm import layers
    from timm.models.vision_transformer import VisionTransformer

    args = {"num_classes": 0, **builder_args}
    if isinstance(args.get("mlp_layer"), str):
        args["mlp_layer"] = getattr(layers, args["mlp_layer"])
    if to_be_loaded:
        with torch.device("meta"):
            probe = timm.create_model(architecture, pretrained=False, **args)
        if isinstance(probe, VisionTransformer):
            args["weight_init"] = "skip"
    trunk: nn.Module = timm.create_model(architecture, pretrained=False, **args)
    return trunk


def build_timm(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build what timm knows the architecture of; every key of the weights has to fit."""
    trunk = timm_trunk(spec.architecture, spec.builder_args, to_be_loaded=not source.random)
    if not source.random:
        state = read_state_dict(hub_file(spec, source), what=spec.name)
        load_exactly(trunk, without_classifier(timm_keys(state), trunk), what=spec.name)
    return with_output(trunk, spec)


def with_output(trunk: nn.Module, spec: EncoderSpec) -> nn.Module:
    """Return the network that gives what the spec's pooling takes."""
    from bagscope.features.encoders.networks import Features

    return trunk if spec.pooling == "output" else Features(trunk)


def timm_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of a DINOv2 training checkpoint to those of timm's vision transformer.

    The backbone is taken out of its wrapper; blocks lose the number of their chunk; the gated MLP's
    `w12`, `w3` become `fc1`, `fc2`. With registers, DINOv2 adds a position to the class token,
    where timm has none: it is added to the token once. Other checkpoints come back unchanged.
    """
    if any(key.startswith("backbone.") for key in state):
        # The projection heads of the training lie beside it.
        state = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key == "mask_token":  # only training masks tokens
            continue
        key = _CHUNKED_BLOCK.sub("blocks.", key)
        if key.startswith("blocks."):
            key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        renamed[key] = value
    if "register_tokens" in renamed:
        positions = renamed.pop("pos_embed")
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return renamed


def without_classifier(
    state: Mapping[str, torch.Tensor], trunk: nn.Module
) -> dict[str, torch.Tensor]:
    """Leave out the classifier, which is not part of an encoder."""
    facts = getattr(trunk, "pretrained_cfg", None) or {}
    names = facts.get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    dropped = tuple(f"{name}." for name in names)
    wanted = trunk.state_dict().keys()
    return {k: v for k, v in state.items() if k in wanted or not k.startswith(dropped)}


def load_transformers(
    kind: type[Any],
    config: Any,
    spec: EncoderSpec,
    state: Mapping[str, torch.Tensor],
    **model_args: Any,
) -> nn.Module:
    """Build a network of transformers from its config and load a hub checkpoint into it.

    Its own loader is used because it renames the keys of the hub to those of its version.

    Raises:
        EncoderUnavailable: keys or shapes that don't fit; names the first.
    """
    network, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with all the others
        **model_args,
    )
    found = {
        "missing": sorted(info["missing_keys"]),
        "unknown": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    findings = [
        f"{len(keys)} {kind_of} such as {', '.join(keys[:SHOWN_KEYS])}"
        for kind_of, keys in found.items()
        if keys
    ]
    if findings:
        raise EncoderUnavailable(
            f"encoder {spec.name}: the weights are of another architecture ({'; '.join(findings)})"
        )
    built: nn.Module = network
    return built


def build_dinov2(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build a Dinov2Model of transformers, which returns its tokens after the last norm.

    Its grid of positions is as large as the weights say; the network resamples it to the input.
    """
    from transformers import Dinov2Config, Dinov2Model

    from bagscope.features.encoders.networks import Answer

    args = dict(spec.builder_args)
    if source.random:
        return Answer(Dinov2Model(Dinov2Config(image_size=spec.input_px, **args)), _TOKENS)
    state = read_state_dict(hub_file(spec, source), what=spec.name)
    positions = state.get("embeddings.position_embeddings")
    grid = math.isqrt(positions.shape[1] - 1) if positions is not None else 0
    image_px = grid * int(args["patch_size"]) or spec.input_px
    config = Dinov2Config(image_size=image_px, **args)
    return Answer(load_transformers(Dinov2Model, config, spec, state), _TOKENS)


def build_remote(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Run the code of the model's repository, which the user has agreed to."""
    from transformers import AutoConfig, AutoModel

    from bagscope.features.encoders.networks import Answer

    folder = str(hub_folder(spec, source))
    if source.random:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_config(config, trust_remote_code=True)  # type: ignore[no-untyped-call]
    else:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return Answer(model, str(spec.builder_args.get("output", "pooler_output")))
