"""Bags dealt into pseudo-bags, and the tiles that stand out in each of them.

A bag's N tiles go into G pseudo-bags whose sizes differ by one at most, longer ones first. Dealt at
random, a tile's turn comes from its row in the slide's file: so it hardly moves when other tiles
are taken out, and the order in which tiles are stored does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bagscope.kernels.hashing import hashed
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import draw_seed
from bagscope.mil.bags import Bags
from bagscope.mil.regimes.draws import ordered, ordered_by_group


class Dealt(NamedTuple):
    """bag (T,), group (T,) from 0 to G − 1, and sizes (B, G): int64."""

    bag: Tensor
    group: Tensor
    sizes: Tensor


def deal(bags: Bags, groups: int, *, use: int | None, in_training: bool) -> Dealt:
    """Deal every bag into pseudo-bags.

    Args:
        bags: keyed by seed, step and name in training; in evaluation by nothing but the tiles.
        groups: G.
        use: which of several deals; None for the order in which tiles are stored.
        in_training: whether another step deals in another way.
    """
    tiles, device = len(bags.features), bags.features.device
    bag = bag_of_tile(bags.cu_seqlens, tiles)
    rank = torch.arange(tiles, device=device) - bags.cu_seqlens[:-1].long()[bag]
    if use is not None:
        row = rank if bags.tile_row is None else bags.tile_row.long()
        seed = draw_seed(bags, use) if in_training else use
        key = hashed(torch.full((), seed, dtype=torch.int64, device=device))
        own = hashed(key ^ bags.bag_keys)[bag] if in_training else key
        drawn = ordered(hashed(own ^ row), bags.cu_seqlens)
        rank = torch.empty_like(rank).scatter_(0, drawn, rank)
    lengths = bags.lengths.long()[:, None]
    sizes = lengths // groups + (torch.arange(groups, device=device) < lengths % groups)
    # How many pseudo-bags end at or before a tile's turn.
    group = (rank[:, None] >= sizes.cumsum(1)[bag]).sum(1)
    return Dealt(bag, group, sizes)


def extremes(keys: Tensor, dealt: Dealt, most: int, *, with_lowest: bool) -> tuple[Tensor, Tensor]:
    """Return the rows with the highest keys of every pseudo-bag, and which of them are there.

    Args:
        keys: (T,) what tiles are ranked by.
        dealt: which pseudo-bag they are in.
        most: m, how many of each.
        with_lowest: whether the m lowest follow; of few tiles some are then among both.

    Returns:
        rows (B, G, m or 2 m) and is_there of the same shape.
    """
    sizes = dealt.sizes
    order = ordered_by_group(-keys, dealt.bag * sizes.shape[1] + dealt.group)
    stops = sizes.flatten().cumsum(0).view(sizes.shape)[:, :, None]
    starts = stops - sizes[:, :, None]
    turn = torch.arange(most, device=keys.device)
    places, are_there = starts + turn, starts + turn < stops
    if with_lowest:
        places = torch.cat([places, stops - most + turn], 2)
        are_there = torch.cat([are_there, stops - most + turn >= starts], 2)
    return order[places.clamp(0, len(order) - 1)], are_there
