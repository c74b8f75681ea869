"""Whether tiles have the places that a model goes by, asked before anything is trained."""

from __future__ import annotations

import numpy as np

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import BagSource


def require_places(model: Aggregator, recipe: TrainSpec, source: BagSource) -> None:
    """Refuse tiles without the places that a model goes by, as far as the first case shows it.

    Raises:
        ConfigError: it has none.
    """
    kind, case = f"aggregator {recipe.aggregator.name} with these options", source.cases[0].case_id
    if model.needs_parents and source.parent(0) is None:
        raise ConfigError(
            f"regime {recipe.regime.name}: the features of {case} are of one resolution; give "
            "those of two aligned tilings, as FINE::COARSE (bagscope tile --coarser-mpp)"
        )
    if model.needs_micrometres:
        bag = source.read(0, np.zeros(1, np.int64))
        if bag.coords_l0 is None or not np.isfinite(bag.mpp_l0).all():
            lacking = "coordinates" if bag.coords_l0 is None else "known pixel size"
            raise ConfigError(
                f"{kind} goes by distances in micrometres, and {case} has no {lacking}; extract "
                "features with both, or choose options that do without"
            )
    elif model.needs_grid and source.grid(0) is None:
        raise ConfigError(
            f"{kind} goes by the tiles' places on the lattice, and {case} has none; extract "
            "features with places, or choose options that do without"
        )
