"""What third parties share with our own tests. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagscope.testing.aggregators import check_aggregator
    from bagscope.testing.encoders import check_encoder
    from bagscope.testing.pairs import PlantedPairs, planted_pairs
    from bagscope.testing.planted import PlantedBags, planted_bags

__all__ = [
    "PlantedBags",
    "PlantedPairs",
    "check_aggregator",
    "check_encoder",
    "planted_bags",
    "planted_pairs",
]

_HOMES = {
    "PlantedBags": "planted",
    "PlantedPairs": "pairs",
    "check_aggregator": "aggregators",
    "check_encoder": "encoders",
    "planted_bags": "planted",
    "planted_pairs": "pairs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
