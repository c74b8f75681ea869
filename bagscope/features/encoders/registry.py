"""Which encoders there are: a registry of facts and builders.

An encoder is registered by decorating the function that builds its network:

    @register_encoder(EncoderSpec(name="my-vit", source="timm", input_px=224, dimension=384, ...))
    def build(spec: EncoderSpec, weights: WeightSource) -> torch.nn.Module: ...

Names of the form `timm:MODEL` and `local:PATH` are made on the spot. Packages of third parties
register through the entry point group `bagscope.encoders`: each entry point names a module, whose
import registers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from bagscope.errors import ConfigError
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.specs import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from bagscope.features.encoders.weights import WeightSource

    Builder = Callable[[EncoderSpec, WeightSource], nn.Module]

ENTRY_POINT_GROUP = "bagscope.encoders"
FAMILIES = (
    "clip",
    "color_texture",
    "conch",
    "ctranspath",
    "dino",
    "efficientnet",
    "genbio",
    "gigapath",
    "gpfm",
    "hibou",
    "hoptimus",
    "kaiko",
    "keep",
    "lunit",
    "midnight",
    "mstar",
    "musk",
    "openmidnight",
    "pathorchestra",
    "phikon",
    "resnet",
    "uni",
    "virchow",
)
"""Modules of this package, each of which registers one family. They import neither torch nor timm
at module level, so that `encoders list` is light."""

_log = logging.getLogger(__name__)
_registered: dict[str, Registered] = {}
_loaded = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A spec and the function that builds its network."""

    spec: EncoderSpec
    build: Builder


def register_encoder(*specs: EncoderSpec) -> Callable[[Builder], Builder]:
    """Register a builder under one or more specs (several embeddings of the same network).

    Raises:
        ValueError: a name is taken; one name is one embedding.
    """

    def decorate(build: Builder) -> Builder:
        for spec in specs:
            if spec.name in _registered:
                raise ValueError(f"encoder {spec.name!r} is registered already")
            _registered[spec.name] = Registered(spec=spec, build=build)
        return build

    return decorate


def encoder_specs() -> dict[str, EncoderSpec]:
    """Return the spec of every registered encoder, by name."""
    _load()
    return {name: _registered[name].spec for name in sorted(_registered)}


def find_encoder(name: str) -> Registered:
    """Return an encoder by name.

    Raises:
        ConfigError: no such encoder; the nearest name is suggested.
    """
    _load()
    if name in _registered:
        return _registered[name]
    scheme, colon, rest = name.partition(":")
    if colon and rest and scheme in ("timm", "local"):
        module = import_module(f"bagscope.features.encoders.{scheme}_scheme")
        found: Registered = module.find(rest)
        return found
    # Separators are what people remember least.
    plain = {re.sub(r"[^a-z0-9]", "", known.lower()): known for known in _registered}
    same = _by_synonym(name) or plain.get(re.sub(r"[^a-z0-9]", "", name.lower()))
    hint = f" (did you mean {same!r}?)" if same else did_you_mean(name, list(_registered))
    raise ConfigError(
        f"no encoder {name!r}{hint}; bagscope encoders list shows all, and timm:MODEL or "
        "local:PATH work for everything else"
    )


def _by_synonym(name: str) -> str | None:
    # Other tools give one name to several embeddings, so theirs are suggested, not accepted.
    for known, registered in _registered.items():
        if name.lower().rpartition("/")[2] in registered.spec.synonyms:
            return known
    return None


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for family in FAMILIES:
        import_module(f"bagscope.features.encoders.{family}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:  # one broken plug-in must not take the others away
            _log.warning("encoder plug-in %s can't be loaded (%s)", point.value, error)
