"""Encoders: facts, builders, weights. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagscope.features.encoders.loading import LoadedEncoder, load_encoder
    from bagscope.features.encoders.registry import encoder_specs, find_encoder, register_encoder
    from bagscope.features.encoders.spec import EncoderSpec
    from bagscope.features.encoders.weights import WeightSource

__all__ = [
    "EncoderSpec",
    "LoadedEncoder",
    "WeightSource",
    "encoder_specs",
    "find_encoder",
    "load_encoder",
    "register_encoder",
]

_HOMES = {
    "EncoderSpec": "spec",
    "LoadedEncoder": "loading",
    "WeightSource": "weights",
    "encoder_specs": "registry",
    "find_encoder": "registry",
    "load_encoder": "loading",
    "register_encoder": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
