"""Mixup of bags: a share of one bag's tiles beside the rest of another's, with both labels.

Bag b of a step gives a share λ of its tiles, the bag after it 1 − λ of its own, drawn anew; the
mixed bag costs λ · loss(label of b) + (1 − λ) · loss(label of the other). λ ~ Beta(α, α) is one per
step. An aggregator that teaches tiles by the label of their bag (CLAM) is told none: its own loss
is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.kernels.segments import bag_of_tile, borders_of
from bagscope.mil.aggregators.registry import aggregator_entry
from bagscope.mil.bags import Bags
from bagscope.mil.objectives.fitted import Losses
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.blending import blended
from bagscope.mil.regimes.draws import ordered, uniforms
from bagscope.mil.regimes.regime import BuildInner, Judge, Regime
from bagscope.mil.regimes.registry import register_regime
from bagscope.mil.targets import TargetSpec
from bagscope.specs import Spec


class MixupOptions(Spec):
    """Options of mixup."""

    alpha: float = Field(
        default=1.0, gt=0, description="of λ ~ Beta(α, α): small mixes little, 1 evenly"
    )


@register_regime(
    "mixup",
    MixupOptions,
    summary="bags are mixed tile by tile, and their labels with them",
    reference="Zhang et al., mixup, ICLR 2018, on bags",
)
class Mixup(Regime):
    """Learns from mixed bags; answers for real ones."""

    whole_steps = True

    def __init__(
        self, features: int, outputs: int, options: MixupOptions, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.alpha = options.alpha
        self.inner = build_inner(features, outputs)
        if self.inner.needs_grid:
            raise ConfigError(
                "regime mixup lays tiles of two bags together, and this aggregator goes by their "
                "places on one lattice; choose options that do without, or another regime"
            )

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return what the mixed bags cost under both labels."""
        share = float(np.random.default_rng([bags.seed, bags.step, 1]).beta(self.alpha, self.alpha))
        partner = torch.arange(1, len(bags) + 1, device=bags.features.device) % len(bags)
        mixed = bags.picked(*mixed_rows(uniforms(bags), bags.cu_seqlens, partner, share))
        # Places of the two would lie upon each other, and a label holds for a part alone.
        mixed = replace(mixed, grid=None, coords_l0=None, parent=None, targets=None)
        output = self.inner(mixed)
        targets = bags.targets or {}
        others = {name: rows[partner] for name, rows in targets.items()}
        return blended(
            [
                (share, judge(output, targets, mixed.lengths)),
                (1 - share, judge(output, others, mixed.lengths)),
            ]
        )

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse steps of a single bag, and losses that compare bags or need a single class.

        Raises:
            ConfigError: says which.
        """
        if recipe.bags.bags_per_step < 2:
            raise ConfigError(
                "regime mixup mixes the bags of a step, and bags.bags_per_step is 1; set it to 2 "
                "or more"
            )
        built_by = aggregator_entry(recipe.aggregator.name).build
        unheard = sorted(set(getattr(built_by, "label_terms", ())) & set(recipe.objective.terms))
        if unheard:
            raise ConfigError(
                f"objective: terms gives a weight to {', '.join(unheard)}, which aggregator "
                f"{recipe.aggregator.name} learns from a bag's class, and the bags that regime "
                "mixup makes have two; leave them out, or choose another regime"
            )
        if recipe.objective.survival == "cox":
            raise ConfigError(
                "regime mixup weighs the loss of two labels, and Cox's loss is of all bags of a "
                "step together; take survival: nll, or another regime"
            )


def mixed_rows(
    numbers: Tensor, cu_seqlens: Tensor, partner: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Return the rows (t,) of the mixed bags and their borders (B + 1,) int32.

    Each bag gives at least one tile to either side.

    Args:
        numbers: (T,) draws: the lowest of a bag stay with it, the highest go into the other.
        cu_seqlens: (B + 1,) of the bags.
        partner: (B,) whose tiles come into each bag.
        share: λ, of a bag's tiles that stay.
    """
    order = ordered(numbers, cu_seqlens)
    lengths = cu_seqlens.diff().long()
    bag = bag_of_tile(cu_seqlens, len(order))
    rank = torch.arange(len(order), device=bag.device) - cu_seqlens[:-1].long()[bag]
    stays = rank < (share * lengths).round().long().clamp(min=1)[bag]
    goes = rank >= lengths[bag] - ((1 - share) * lengths).round().long().clamp(min=1)[bag]
    taker = torch.empty_like(partner)
    taker[partner] = torch.arange(len(partner), device=partner.device)
    rows = torch.cat([order[stays], order[goes]])
    place = torch.cat([bag[stays], taker[bag[goes]]])
    counts = torch.bincount(place, minlength=len(lengths))
    borders = borders_of(counts)
    return rows[place.argsort(stable=True)], borders
