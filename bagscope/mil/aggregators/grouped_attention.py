"""Grouped double attention, CoMEL's re-embedder: groups ask the tiles, then tiles ask the groups.

    G  = means of m contiguous groups of the bag's tiles
    G' = softmax(s W_q G (W_k X)ᵀ) W_v X
    X' = X + W_o softmax(s W_q' X (W_k' G')ᵀ) W_v' G'

with X behind a layer norm, H heads, s = 1/√d. The groups are as equal as they can be, longer ones
first; a bag of fewer tiles than m has a group per tile. 4·T·width·(2 m + 3 width) operations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.linear_attention.agent import ask_agents
from bagscope.kernels.linear_attention.halves import bag_mean
from bagscope.mil.aggregators.layers import linear


class GroupedAttention(nn.Module):
    """Tiles learn of the rest of their bag through its groups; what a tile was stays in it."""

    def __init__(self, width: int, *, groups: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"aggregator comel: hidden is {width}, which {heads} heads do not divide; change "
                "heads"
            )
        self.groups, self.heads = groups, heads
        self.norm = nn.LayerNorm(width)
        self.group_query = nn.Linear(width, width)
        self.tile_key = nn.Linear(width, width)
        self.tile_value = nn.Linear(width, width)
        self.tile_query = nn.Linear(width, width)
        self.group_key = nn.Linear(width, width)
        self.group_value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, narrow: torch.dtype) -> Tensor:
        """Return X' (T, width), full precision as x; products are done in the dtype `narrow`."""
        seen = self.norm(x).to(narrow)
        sizes = group_sizes(cu_seqlens, self.groups)
        borders = functional.pad(sizes.flatten().cumsum(0), (1, 0)).to(torch.int32)
        means = bag_mean(self._split(linear(seen, self.group_query)), borders)
        keys, values = linear(seen, self.tile_key), linear(seen, self.tile_value)
        told, _, _ = cross_attention_pool(
            means.view(*sizes.shape, *means.shape[1:]),
            self._split(keys),
            self._split(values),
            cu_seqlens,
        )
        told = told.flatten(2).to(x.dtype)
        found = ask_agents(
            self._split(linear(seen, self.tile_query)),
            self._split(self.group_key(told)),
            self._split(self.group_value(told)),
            cu_seqlens,
            used=sizes > 0,
        )
        return x + linear(found.flatten(1).to(narrow), self.out).to(x.dtype)

    def _split(self, x: Tensor) -> Tensor:
        """Return (..., H, d) of (..., width)."""
        return x.reshape(*x.shape[:-1], self.heads, -1)


def group_sizes(cu_seqlens: Tensor, groups: int) -> Tensor:
    """Return how many tiles each group of each bag has: (B, m) int64."""
    lengths = cu_seqlens.diff().long()[:, None]
    index = torch.arange(groups, device=cu_seqlens.device)
    return lengths // groups + (index < lengths % groups).long()
