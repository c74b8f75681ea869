"""Pseudo-bags: each bag is dealt into several, and each of them is to be right by itself.

The tiles are dealt anew in every step. So a bag gives several examples, at the price that a part
without the tiles that decide has the label too: for labels that many tiles show.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile, borders_of
from bagscope.mil.bags import Bags
from bagscope.mil.objectives.fitted import Losses
from bagscope.mil.regimes.blending import blended
from bagscope.mil.regimes.draws import shuffled
from bagscope.mil.regimes.regime import BuildInner, Judge, Regime
from bagscope.mil.regimes.registry import register_regime
from bagscope.specs import Spec


class PseudoBagsOptions(Spec):
    """Options of pseudo-bags."""

    count: int = Field(default=4, ge=2, description="pseudo-bags that a bag is dealt into")


@register_regime(
    "pseudo_bags",
    PseudoBagsOptions,
    summary="each bag is dealt into several that are to be right each by itself",
    reference="Zhang et al., DTFD-MIL, CVPR 2022 (its first tier)",
)
class PseudoBags(Regime):
    """Learns from parts of bags; answers for whole ones."""

    def __init__(
        self, features: int, outputs: int, options: PseudoBagsOptions, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.count = options.count
        self.inner = build_inner(features, outputs)

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return the mean over the pseudo-bags of what each costs."""
        order = shuffled(bags)
        parts = []
        for number in range(self.count):
            part = bags.picked(*dealt(order, bags.cu_seqlens, number, self.count))
            found = judge(self.inner(part), bags.targets or {}, part.lengths)
            parts.append((1 / self.count, found))
        return blended(parts)


def dealt(order: Tensor, cu_seqlens: Tensor, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Return a pseudo-bag of every bag: its rows (t,) and borders (B + 1,) int32.

    A bag of fewer tiles than pseudo-bags gives some of its tiles to several.

    Args:
        order: (T,) rows, each bag's shuffled within its borders.
        cu_seqlens: (B + 1,) of the bags.
        number: which of the pseudo-bags, from 0.
        count: of pseudo-bags.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    sizes = ((lengths - number - 1) // count + 1).clamp(min=1)
    borders = borders_of(sizes)
    bag = bag_of_tile(borders, int(borders[-1]))
    turn = torch.arange(len(bag), device=bag.device) - borders[:-1].long()[bag]
    place = (number + turn * count) % lengths[bag]
    return order[starts[bag] + place], borders
