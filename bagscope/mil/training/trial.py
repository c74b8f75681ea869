"""A step on two made-up bags: what only a step finds wrong with a recipe is found before training.

Which terms a loss has, and whether attention has an entropy, is known from what a model answers in
training. So a fresh one is asked once, without a feature being read, and is thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.objectives.fitted import FittedObjective, Losses
from bagscope.mil.regimes.regime import Regime

_SIDE = 4
"""Of the square of tiles that a made-up bag is."""
_STEP_L0 = 256
_TILE_UM = 128.0


def require_step(
    model: Aggregator,
    objective: FittedObjective,
    labels: Mapping[str, NDArray[np.float64]],
    features: int,
) -> None:
    """Let a fresh model, which is of no use afterwards, take the forward half of a step.

    Args:
        model: of the recipe.
        objective: fitted to a training side.
        labels: (n, w) of that side's cases by target, NaN where missing.
        features: width of a tile's vector.

    Raises:
        ConfigError: a weight for a term that there is not, or entropy of a model without any.
    """
    first = labels[objective.targets[0].name]
    rows = np.flatnonzero(np.isfinite(first).all(axis=1))[:2]
    targets = {name: torch.from_numpy(values[rows]) for name, values in labels.items()}
    bags = _made_up(len(rows), features, targets)

    def judge(
        output: BagOutput, targets: Mapping[str, Tensor], lengths: Tensor | None = None
    ) -> Losses:
        return objective(output, targets, progress=bags.progress, lengths=lengths)

    model.train()
    with torch.no_grad():
        if isinstance(model, Regime):
            model.begin(objective)
            model.losses(bags, judge)
        else:
            judge(model(bags), targets, bags.lengths)


def _made_up(count: int, features: int, targets: Mapping[str, Tensor]) -> Bags:
    """Return bags with all that a tile can have: places, sizes, parents."""
    places = torch.arange(_SIDE**2)
    grid = torch.stack([places % _SIDE, places // _SIDE], dim=1).int().repeat(count, 1)
    column, row = (grid // 2).long().unbind(1)
    names = tuple(f"made up {number}" for number in range(count))
    vectors = torch.randn(len(grid), features, generator=torch.Generator().manual_seed(0))
    return Bags(
        features=vectors,
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * _SIDE**2,
        bag_ids=names,
        coords_l0=grid * _STEP_L0,
        grid=grid,
        parent=row * _SIDE + column,
        slide_ids=names,
        tile_slide=torch.arange(count, dtype=torch.int32).repeat_interleave(_SIDE**2),
        tile_row=places.int().repeat(count),
        tile_um=torch.full((count,), _TILE_UM, dtype=torch.float64),
        mpp_l0=torch.full((count,), _TILE_UM / _STEP_L0, dtype=torch.float64),
        targets=targets,
    )
