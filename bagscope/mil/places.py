"""Whether tiles have the places that a model goes by, asked before anything is trained."""

from __future__ import annotations

import numpy as np

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import BagSource
from bagscope.wording import listed

_NO_ROWS = np.zeros(0, np.int64)
"""A bag of no rows says which places its tiles have, and no vector is read for it."""


def require_places(model: Aggregator, recipe: TrainSpec, source: BagSource) -> None:
    """Refuse cases whose tiles lack the places that a model goes by; names them.

    Raises:
        ConfigError: there are some.
    """
    kind = f"aggregator {recipe.aggregator.name} with these options"
    places = range(len(source.cases))
    if model.needs_parents and (
        lacking := [place for place in places if source.parent(place) is None]
    ):
        raise ConfigError(
            f"regime {recipe.regime.name}: the features of {_names(source, lacking)} are of one "
            "resolution; give those of two aligned tilings, as FINE::COARSE (bagscope tile "
            "--coarser-mpp)"
        )
    if recipe.bags.sampling == "spatial" and (
        lacking := [place for place in places if source.grid(place) is None]
    ):
        raise ConfigError(
            f"bags.sampling is spatial, and of {_names(source, lacking)} there are no places on "
            "the lattice; extract features with places, or choose uniform"
        )
    if model.needs_micrometres:
        bags = [source.read(place, _NO_ROWS) for place in places]
        without = {
            "coordinates": [place for place in places if bags[place].coords_l0 is None],
            "known pixel sizes": [
                place for place in places if not np.isfinite(bags[place].mpp_l0).all()
            ],
        }
        for what, lacking in without.items():
            if lacking:
                raise ConfigError(
                    f"{kind} goes by distances in micrometres, and of {_names(source, lacking)} "
                    f"there are no {what}; extract features with both, or choose options that do "
                    "without"
                )
    elif model.needs_grid and (
        lacking := [place for place in places if source.grid(place) is None]
    ):
        raise ConfigError(
            f"{kind} goes by the tiles' places on the lattice, and of {_names(source, lacking)} "
            "there are none; extract features with places, or choose options that do without"
        )


def _names(source: BagSource, places: list[int]) -> str:
    total = len(source.cases)
    share = f" ({len(places)} of {total} cases)" if total > 1 else ""
    return listed([source.cases[place].case_id for place in places]) + share
