"""Draws for the tiles of bags, keyed by seed, step, bag and the tile's place in it.

So a bag gets the same draws alone and packed, on any device, and after being interrupted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.hashing import hashed, key_of_step, uniform
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.bags import Bags


def uniforms(bags: Bags, use: int = 0) -> Tensor:
    """Return a number in [0, 1) for each tile: (T,) float64.

    Args:
        bags: whose seed, step and names key the draws.
        use: what for; two uses in a step never share a number.
    """
    tiles, device = len(bags.features), bags.features.device
    bag = bag_of_tile(bags.cu_seqlens, tiles)
    place = torch.arange(tiles, device=device) - bags.cu_seqlens[:-1].long()[bag]
    key = hashed(key_of_step(bags.seed, bags.step, device) + use)
    return uniform(hashed(hashed(key ^ bags.bag_keys)[bag] ^ place))


def shuffled(bags: Bags, use: int = 0) -> Tensor:
    """Return the rows (T,) int64 of the bags, each bag's in a random order within its borders."""
    return ordered(uniforms(bags, use), bags.cu_seqlens)


def ordered(numbers: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the rows (T,) int64 by rising number within each bag; ties keep their order."""
    return ordered_by_group(numbers, bag_of_tile(cu_seqlens, len(numbers)))


def ordered_by_group(numbers: Tensor, group: Tensor) -> Tensor:
    """Return the rows (T,) by group, and by rising number in each; ties keep their order."""
    order = numbers.argsort(stable=True)
    return order[group[order].argsort(stable=True)]
