"""`local:PATH`: a network whose weights lie in a file of yours, described by a file beside them.

PATH is one of
    a folder with config.json and model.safetensors, as timm saves for the hub
    a folder with encoder.yaml, an `EncoderSpec` in YAML that names a timm architecture
    a checkpoint FILE.pth with FILE.yaml beside it, such a YAML

The name is that of the file or folder, without its path: the hash of the weights tells two of the
same name apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bagscope.errors import ConfigError
from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import load_exactly, read_state_dict
from bagscope.specs import parse_spec

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

_SPEC_FILE = "encoder.yaml"
_TIMM_FILE = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find(path: str) -> Registered:
    """Return the encoder that a folder or a checkpoint describes.

    Raises:
        ConfigError: nothing there, no description, or one that does not hold together.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if (place / _SPEC_FILE).is_file():
            return _described(place / _SPEC_FILE, name=place.resolve().name, weights=None)
        if (place / _TIMM_FILE).is_file():
            return _saved_by_timm(place)
        raise ConfigError(
            f"local:{path}: the folder has neither {_SPEC_FILE} nor {_TIMM_FILE}; write "
            f"{_SPEC_FILE} (docs/encoders.md shows one)"
        )
    if not place.is_file():
        raise ConfigError(f"local:{path}: no such file or folder")
    description = place.with_suffix(".yaml")
    if not description.is_file():
        raise ConfigError(
            f"local:{path}: {description.name} is missing beside it; it says which network the "
            "weights belong to (docs/encoders.md shows one)"
        )
    return _described(description, name=place.stem, weights=place)


def _described(description: Path, *, name: str, weights: Path | None) -> Registered:
    """Read an `EncoderSpec` from YAML; what the network itself tells may be left out."""
    where = str(description)
    try:
        values = yaml.safe_load(description.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML ({reason})") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected options such as architecture and input_px")
    values = {"source": "timm", **values, "name": f"local:{values.get('name', name)}"}
    if values["source"] != "timm" or not values.get("architecture"):
        raise ConfigError(
            f"{where}: architecture has to name a network of timm, such as vit_small_patch16_224"
        )
    if weights is None:
        weights = _weights_beside(description, values.get("weights_file"))
    values["weights_file"] = str(weights.resolve())
    measured = dict(values)
    measured.setdefault("dimension", 1)
    spec = parse_spec(EncoderSpec, measured, where=where)
    facts = _measured(spec, where=where)
    for field, seen in facts.items():
        if field in values and values[field] != seen:
            raise ConfigError(
                f"{where}: {field} is {values[field]!r}, but {spec.architecture} with these "
                f"options has {seen}"
            )
    return Registered(spec=spec.model_copy(update=facts), build=build)


def _weights_beside(description: Path, named: object) -> Path:
    names = (str(named),) if named else _WEIGHTS
    for name in names:
        weights = description.parent / name
        if weights.is_file():
            return weights
    raise ConfigError(
        f"{description}: its weights are missing ({' or '.join(names)} in the same folder)"
    )


def _measured(spec: EncoderSpec, *, where: str) -> dict[str, int]:
    """Run the network without computing: how long its vectors are, how many tokens go before."""
    import torch

    from bagscope.features.encoders.builders import timm_trunk, with_output
    from bagscope.features.encoders.loading import pool

    try:
        with torch.device("meta"):
            trunk = timm_trunk(spec.architecture, spec.builder_args).eval()
        facts = {}
        if spec.pooling in ("token", "token+mean", "mean"):
            facts["prefix_tokens"] = int(getattr(trunk, "num_prefix_tokens", 0))
        spec = spec.model_copy(update=facts)
        images = torch.empty(1, 3, spec.input_px, spec.input_px, device="meta")
        vectors = pool(with_output(trunk, spec)(images), spec)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as bad:
        reason = " ".join(str(bad).split())[:300]
        raise ConfigError(
            f"{where}: timm can't build or run {spec.architecture!r} with these options ({reason})"
        ) from bad
    if vectors.ndim != 2:
        raise ConfigError(
            f"{where}: pooling {spec.pooling!r} gives {tuple(vectors.shape)} for one image, not "
            "one vector; try token or mean"
        )
    return {**facts, "dimension": int(vectors.shape[1])}


def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    """Build the network; every key of the file has to fit."""
    from bagscope.features.encoders.builders import (
        timm_keys,
        timm_trunk,
        with_output,
        without_classifier,
    )

    trunk = timm_trunk(spec.architecture, spec.builder_args, to_be_loaded=not source.random)
    if not source.random:
        assert spec.weights_file is not None
        state = read_state_dict(Path(spec.weights_file), what=spec.name)
        load_exactly(trunk, without_classifier(timm_keys(state), trunk), what=spec.name)
    return with_output(trunk, spec)


def _saved_by_timm(folder: Path) -> Registered:
    """Read a folder as `timm.models.push_to_hf_hub` and `save_for_hf` write it."""
    from bagscope.features.encoders.timm_scheme import facts_of

    where = str(folder / _TIMM_FILE)
    try:
        config = json.loads((folder / _TIMM_FILE).read_text())
    except ValueError as error:
        raise ConfigError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(config, dict) or not config.get("architecture"):
        raise ConfigError(
            f"{where}: names no timm architecture; describe the network in {_SPEC_FILE} instead"
        )
    facts = config.get("pretrained_cfg") or {}
    args = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    weights = _weights_beside(folder / _TIMM_FILE, None)
    values: dict[str, Any] = facts_of(facts, where=where)
    # An empty pooling leaves tokens, of which the class token is the network's summary.
    if args.get("global_pool", config.get("global_pool")) == "":
        values["pooling"] = "token"
    elif "global_pool" in config:
        args.setdefault("global_pool", config["global_pool"])
    values.update(
        name=f"local:{folder.resolve().name}",
        architecture=config["architecture"],
        builder_args=args,
        weights_file=str(weights.resolve()),
        licence=facts.get("license") or "",
        dimension=1,
    )
    spec = parse_spec(EncoderSpec, values, where=where)
    return Registered(spec=spec.model_copy(update=_measured(spec, where=where)), build=build)
