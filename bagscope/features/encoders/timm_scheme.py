"""`timm:MODEL`: any network that timm knows, with the facts and the weights that timm states."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bagscope.errors import ConfigError, EncoderUnavailable
from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import hub_file, read_state_dict
from bagscope.specs import parse_spec

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource


def find(model: str) -> Registered:
    """Return the encoder of a timm model, pooled as timm does before the classifier.

    The name is completed by the tag of the weights (`resnet50` → `resnet50.a1_in1k`), so that
    another default in another version of timm never passes for the same encoder.

    Raises:
        ConfigError: timm knows no such model, or it sees no square RGB image.
    """
    import timm

    architecture, _, tag = model.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if not timm.is_model(architecture) or (tag and model not in tagged):
        names = timm.list_models(pretrained=True) if tag else timm.list_models()
        near = difflib.get_close_matches(model, names, n=1, cutoff=0)
        raise ConfigError(
            f"timm {timm.__version__} knows no model {model!r} (did you mean {near[0]!r}?); "
            "timm.list_models() shows all"
        )
    facts = timm.get_pretrained_cfg(architecture if not tag else model)
    if facts is None:
        raise ConfigError(
            f"timm:{model}: timm states no facts of it; describe it in a YAML and use local:PATH"
        )
    if facts.tag:
        architecture = f"{architecture}.{facts.tag}"
    values = facts_of(asdict(facts), where=f"timm:{model}")
    values.update(
        name=f"timm:{architecture}",
        architecture=architecture,
        hub_id=facts.hf_hub_id,
        weights_file=facts.hf_hub_filename,
        licence=facts.license or "",
        card=f"https://huggingface.co/{facts.hf_hub_id}" if facts.hf_hub_id else "",
    )
    values["dimension"] = dimension_of(architecture, {}, int(values["input_px"]), where=model)
    return Registered(spec=parse_spec(EncoderSpec, values, where=f"timm:{model}"), build=build)


def facts_of(facts: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Translate timm's `pretrained_cfg` to the fields of an `EncoderSpec`.

    Raises:
        ConfigError: not a square RGB input.
    """
    channels, height, width = facts.get("input_size") or (3, 224, 224)
    if channels != 3 or height != width:
        raise ConfigError(
            f"{where}: it sees images of {channels} channels and {height} × {width} pixels; only "
            "square RGB tiles are encoded"
        )
    values: dict[str, Any] = {
        "source": "timm",
        "input_px": height,
        "interpolation": facts.get("interpolation") or "bicubic",
        "pooling": "output",
    }
    resize_px = math.floor(height / (facts.get("crop_pct") or 1.0))
    if resize_px != height:
        values["resize_px"] = resize_px
    values.update({key: tuple(facts[key]) for key in ("mean", "std") if facts.get(key)})
    return values


def dimension_of(
    architecture: str, builder_args: Mapping[str, Any], input_px: int, *, where: str
) -> int:
    """Return the length of a timm network's vectors, measured without computing anything.

    Raises:
        ConfigError: it returns something else than one vector per image.
    """
    import torch

    from bagscope.features.encoders.builders import timm_trunk

    with torch.device("meta"):
        trunk = timm_trunk(architecture, builder_args).eval()
    shape = trunk(torch.empty(1, 3, input_px, input_px, device="meta")).shape
    if len(shape) != 2:
        raise ConfigError(
            f"{where}: it returns {tuple(shape)} for one image, not one vector; describe its "
            "pooling in a YAML and use local:PATH"
        )
    return int(shape[1])


def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the network; timm itself puts the state dict in, as it stores some under other keys."""
    import timm

    if source.random:
        from bagscope.features.encoders.builders import timm_trunk

        return timm_trunk(spec.architecture, spec.builder_args)
    state = read_state_dict(hub_file(spec, source), what=spec.name)
    try:
        # With its classifier, because timm checks every key only then.
        network: Any = timm.create_model(
            spec.architecture, pretrained=True, pretrained_cfg_overlay={"state_dict": state}
        )
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise EncoderUnavailable(
            f"encoder {spec.name}: the weights are of another architecture ({reason})"
        ) from error
    network.pretrained_cfg.pop("state_dict", None)  # else every tensor is held twice
    network.reset_classifier(0)
    built: nn.Module = network
    return built
