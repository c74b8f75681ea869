"""Attention inside regions of a slide and between them (RRT-MIL, Tang et al. 2024).

R-MSA, inside a region:   softmax(s q kᵀ + conv(s q kᵀ)) v, the convolution along the queries (EPEG)
CR-MSA, between regions:  r_n = Σ softmax(x φ_n) x over a region's tiles: its representative n
                          r ← attention over the bag's regions, for each n by itself
                          out = Σ_n softmax_n(x φ) m_n r_n
                          m_n: where x φ_n lies between its least and largest in the region

The convolution is linear in the queries, so it is one of the queries: Σ_j w_j (q_{i+j} · k) =
(Σ_j w_j q_{i+j}) · k. No matrix of a region's tiles by its tiles is ever made. Its bias is the same
for all keys and changes no softmax, so there is none.

T tiles, B bags, g² regions of each bag, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.linear_attention.halves import ask
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.kernels.varlen_self_attention import varlen_self_attention
from bagscope.mil.aggregators.layers import in_parts, linear
from bagscope.mil.aggregators.mamba import Way
from bagscope.mil.aggregators.rolling import pulled_through, pulled_through_softmax

_EPS = 1e-8
_BLOCK = 32
"""Rows that one product of the convolution makes; with k taps it reads k - 1 more."""


class RegionAttention(nn.Module):
    """Tiles learn of those of their region (R-MSA)."""

    def __init__(self, hidden: int, heads: int, taps: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        bound = 1 / math.sqrt(max(taps, 1))
        self.epeg = nn.Parameter(torch.empty(heads, taps).uniform_(-bound, bound)) if taps else None
        self.heads = heads

    def forward(self, x: Tensor, regions: Way) -> Tensor:
        """Return (T, hidden) of tiles (T, hidden) in regions."""
        q, k, v = self._asked(x, regions)
        found = varlen_self_attention(q, k, v, regions.borders).flatten(1)
        return linear(found[regions.places], self.proj)

    def pulled(self, x: Tensor, regions: Way, weights: Tensor) -> Tensor:
        """Return weights (T,) of what tiles learn as those of whom they learn it; see `rolling`."""
        q, k, _ = self._asked(x, regions)
        # Places that no tile stands for ask for nothing, and what falls on them is lost.
        asking = weights.new_zeros(len(q)).index_copy(0, regions.places, weights)
        return pulled_through_softmax(q, k, asking, regions.borders)[regions.places]

    def _asked(self, x: Tensor, regions: Way) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (P, H, d) of the places in regions."""
        parts = linear(regions.along(x), self.qkv).chunk(3, 1)
        q, k, v = (in_parts(part, self.heads) for part in parts)
        if self.epeg is not None:
            q = q + convolved(q, self.epeg.to(q.dtype), regions.borders)
        return q, k, v


class CrossRegionAttention(nn.Module):
    """Regions learn of each other through a few representatives (CR-MSA)."""

    def __init__(self, hidden: int, heads: int, representatives: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.empty(hidden, representatives))
        nn.init.kaiming_uniform_(self.phi, a=math.sqrt(5))
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.heads = heads

    def forward(self, x: Tensor, regions: Way, bags: int) -> Tensor:
        """Return (T, hidden) of tiles (T, hidden) in regions of so many bags."""
        rows, logits = self._logits(x, regions)
        between, v = self._between(rows, logits, regions, bags)
        told: Tensor = self.proj((between @ v).permute(0, 3, 1, 2, 4).flatten(3))
        told = in_parts(told.flatten(0, 1), self.heads).transpose(1, 2)
        found = self._told(logits, told, regions)
        return found.flatten(1)[regions.places]

    def pulled(self, x: Tensor, regions: Way, bags: int, weights: Tensor) -> Tensor:
        """Return weights (T,) of what tiles learn as those of whom they learn it; see `rolling`."""
        rows, logits = self._logits(x, regions)
        between, _ = self._between(rows, logits, regions, bags)

        def attend(values: Tensor) -> Tensor:
            own = segment_softmax_pool(logits, regions.along(values[..., 0]), regions.borders)
            few = own.pooled.view(bags, -1, *own.pooled.shape[1:]).permute(0, 2, 3, 1)
            told = (between @ few[..., None]).squeeze(-1).permute(0, 3, 2, 1).flatten(0, 1)
            return self._told(logits, told[..., None], regions)[regions.places]

        like = x.new_empty(len(x), self.heads, 1, dtype=logits.dtype)
        return pulled_through(attend, weights, like, adds_up=False)

    def _logits(self, x: Tensor, regions: Way) -> tuple[Tensor, Tensor]:
        """Return the places' rows (P, hidden), and x φ of them (P, n)."""
        rows = regions.along(x)
        return rows, (rows @ self.phi.to(rows.dtype)).to(self.phi.dtype)

    def _between(
        self, rows: Tensor, logits: Tensor, regions: Way, bags: int
    ) -> tuple[Tensor, Tensor]:
        """Return how representatives weigh those of regions that exist, and their values.

        (B, n, H, g², g²), and (B, n, H, g², d).
        """
        pooled = segment_softmax_pool(logits, rows, regions.borders).pooled
        parts = self.qkv(pooled.view(bags, -1, *pooled.shape[1:])).chunk(3, 3)
        q, k, v = (in_parts(part, self.heads).permute(0, 2, 3, 1, 4) for part in parts)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        is_there = (regions.borders.diff() > 0).view(bags, 1, 1, 1, -1)
        return scores.masked_fill(~is_there, -torch.inf).softmax(-1), v

    def _told(self, logits: Tensor, told: Tensor, regions: Way) -> Tensor:
        """Return what places (P, H, d) take of their region's representatives (B·g², H, n, d)."""
        weights = logits.softmax(1) * min_max(logits, regions.borders)
        return ask(
            weights[:, None].expand(-1, self.heads, -1).contiguous(),
            told.contiguous(),
            regions.borders,
        )


def convolved(q: Tensor, taps: Tensor, borders: Tensor) -> Tensor:
    """Return q (P, H, d) convolved along the rows of each region with taps (H, k), k odd.

    As products of a band matrix with blocks of rows: a convolution of channels takes twice as
    long on a processor.
    """
    k, regions = taps.shape[1], len(borders) - 1
    gap = k // 2
    # Zeros between the regions: one band serves all, and none sees another.
    at = torch.arange(len(q), device=q.device) + gap * bag_of_tile(borders, len(q))
    blocks = (len(q) + gap * regions + _BLOCK - 1) // _BLOCK
    apart = q.new_zeros(blocks * _BLOCK + k - 1, *q.shape[1:]).index_copy(0, at + gap, q)
    ahead = torch.arange(_BLOCK + k - 1, device=q.device)
    tap = ahead - torch.arange(_BLOCK, device=q.device)[:, None]
    band = taps[:, tap.clamp(0, k - 1)].masked_fill((tap < 0) | (tap >= k), 0.0)
    windows = apart.unfold(0, _BLOCK + k - 1, _BLOCK)
    return torch.einsum("nhdw,hbw->nbhd", windows, band).flatten(0, 1)[at]


def min_max(logits: Tensor, borders: Tensor) -> Tensor:
    """Return where between its region's least and largest a logit (P, n) lies; 0 where alone."""
    region = bag_of_tile(borders, len(logits))
    index, shape = region[:, None].expand_as(logits), (len(borders) - 1, logits.shape[1])
    low = logits.new_full(shape, torch.inf).scatter_reduce(0, index, logits, "amin")[region]
    high = logits.new_full(shape, -torch.inf).scatter_reduce(0, index, logits, "amax")[region]
    return (logits - low) / (high - low + _EPS)


def stored_regions(cu_seqlens: Tensor, tiles: int, side: int, *, is_filled: bool) -> Way:
    """Return tiles in side² regions of a square that they fill row by row as they are stored.

    The square of a bag of N has ⌈√N⌉ places a side, rounded up to a multiple of `side`.

    Args:
        cu_seqlens: (B + 1,) int32.
        tiles: T.
        side: g, regions along a side.
        is_filled: whether the places after the last tile are rows of zeros, or no rows.
    """
    lengths, bag = cu_seqlens.diff().long(), bag_of_tile(cu_seqlens, tiles)
    root = lengths.double().sqrt().ceil().long().clamp(min=1)
    region_side = (root + side - 1) // side
    own = torch.arange(tiles, device=bag.device) - cu_seqlens[bag].long()
    length, wide = region_side[bag], region_side[bag] * side
    row, column = own // wide, own % wide
    region = row // length * side + column // length
    inside = row % length * length + column % length
    if not is_filled:
        return _sorted(bag * side**2 + region, [inside], len(lengths) * side**2)
    sizes = (region_side**2).repeat_interleave(side**2)
    borders = functional.pad(sizes.cumsum(0), (1, 0))
    places = borders[bag * side**2 + region] + inside
    rows = torch.full((int(borders[-1]),), tiles, device=bag.device)
    rows[places] = torch.arange(tiles, device=bag.device)
    return Way(rows=rows, places=places, borders=borders.int())


def lattice_regions(grid: Tensor, cu_seqlens: Tensor, side: int) -> Way:
    """Return tiles in side² equal rectangles of what their places (T, 2) span, row by row."""
    bag = bag_of_tile(cu_seqlens, len(grid))
    places = grid.long()
    index, shape = bag[:, None].expand_as(places), (len(cu_seqlens) - 1, 2)
    low = places.new_zeros(shape).scatter_reduce(0, index, places, "amin", include_self=False)
    high = places.new_zeros(shape).scatter_reduce(0, index, places, "amax", include_self=False)
    own = places - low[bag]
    column, row = (own * side // (high - low + 1)[bag]).unbind(1)
    region = (bag * side + row) * side + column
    return _sorted(region, [own[:, 0], own[:, 1]], (len(cu_seqlens) - 1) * side**2)


def _sorted(region: Tensor, keys: list[Tensor], regions: int) -> Way:
    """Return tiles by region (T,), inside it by the keys, the last of which comes first."""
    order = torch.arange(len(region), device=region.device)
    for key in (*keys, region):
        order = order[torch.argsort(key[order], stable=True)]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    sizes = region.new_zeros(regions).scatter_add(0, region, torch.ones_like(region))
    return Way(rows=order, places=places, borders=functional.pad(sizes.cumsum(0), (1, 0)).int())
