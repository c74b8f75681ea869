"""ADS, PackMIL's downsampler: tiles weighted by attention, then groups of r tiles become one.

α = softmax over the bag of w·tanh(V x + b) + c,   x ← x + α x
h = GELU(E x)                                     (T, D)
of each group of r tiles, in a random order        (T / r, r D)
    max      the largest value of each feature
    random   D of the r D values, one choice for all groups of a bag
out = Linear of that, or of h itself where nothing is compressed

A bag is filled up with zeros to a multiple of r. In evaluation nothing is compressed, so every tile
keeps its place. Memory in training: about 4 T D numbers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.segment_softmax_pool import accumulator
from bagscope.kernels.segments import bag_of_tile, borders_of
from bagscope.mil.aggregators.layers import linear, xavier
from bagscope.mil.bags import segment_softmax

Kind = Literal["max", "random"]
_ATTENTION = 128
_ROWS = 16_384
"""Tiles that evaluation works on at a time."""


class Downsampler(nn.Module):
    """From tiles to tiles of the same width, in training to fewer."""

    def __init__(self, features: int, r: int, *, attention: int = _ATTENTION) -> None:
        """Prepare layers.

        Args:
            features: width of a tile's vector.
            r: tiles that become one.
            attention: width of the attention's hidden layer.
        """
        super().__init__()
        self.r = r
        self.v = nn.Linear(features, attention)
        self.w = nn.Linear(attention, 1)
        self.embed = nn.Linear(features, features)
        self.out = nn.Linear(features, features)
        xavier(self)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return tiles (T, D) of tiles (T, D); none is compressed, none moves."""
        x = self._weighted(features, cu_seqlens)
        parts = [linear(self._embedded(rows), self.out) for rows in torch.split(x, _ROWS)]
        return torch.cat(parts)

    def compressed(
        self,
        features: Tensor,
        cu_seqlens: Tensor,
        *,
        is_long: Tensor,
        order: Tensor,
        coordinates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return fewer tiles (t, D), and their borders (B + 1,) int32.

        Args:
            features: (T, D).
            cu_seqlens: (B + 1,) int32.
            is_long: (B,) which bags are compressed.
            order: (T',) places among the borders of `padded`, each bag's shuffled within them.
            coordinates: (B, D) int64 rising, which of the r D values are kept, r of each feature
                side by side; None for the largest of each feature.
        """
        lengths, starts = cu_seqlens.diff().long(), cu_seqlens[:-1].long()
        borders = self.padded(cu_seqlens, is_long)
        bag = bag_of_tile(borders, len(order))
        place = order - borders[:-1].long()[bag]
        # A row of zeros at the end is what a bag is filled up with.
        x = self._weighted(features, cu_seqlens)
        h = self._embedded(torch.cat([x, x.new_zeros(1, x.shape[1])]))
        h = h[torch.where(place < lengths[bag], starts[bag] + place, len(x))]
        is_grouped = is_long[bag]
        groups = h[is_grouped].view(-1, self.r, h.shape[1])
        group_bag = bag[is_grouped][:: self.r]
        if coordinates is None:
            made = groups.amax(1)
        else:
            chosen = coordinates[group_bag]
            group = torch.arange(len(groups), device=h.device)[:, None]
            made = groups[group, chosen % self.r, chosen // self.r]
        whose = torch.cat([group_bag, bag[~is_grouped]])
        counts = torch.bincount(whose, minlength=len(lengths))
        found = torch.cat([made, h[~is_grouped]])[whose.argsort(stable=True)]
        fewer = borders_of(counts)
        return linear(found, self.out), fewer

    def padded(self, cu_seqlens: Tensor, is_long: Tensor) -> Tensor:
        """Return the borders (B + 1,) int32 once those to be compressed are filled up."""
        lengths = cu_seqlens.diff()
        filled = (lengths + self.r - 1) // self.r * self.r
        lengths = torch.where(is_long, filled, lengths)
        return borders_of(lengths)

    def _weighted(self, features: Tensor, cu_seqlens: Tensor) -> Tensor:
        scores = linear(linear(features, self.v).tanh(), self.w)
        bag = bag_of_tile(cu_seqlens, len(features))
        alpha = segment_softmax(scores.to(accumulator(scores.dtype)), bag, len(cu_seqlens) - 1)
        return (features * (1 + alpha)).to(scores.dtype)

    def _embedded(self, x: Tensor) -> Tensor:
        return functional.gelu(linear(x, self.embed))
