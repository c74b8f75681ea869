"""The Hilbert curve: lattice places that follow each other on it lie close together."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16
"""Lattices of up to 2^16 by 2^16 places: no slide has more tiles on a side."""


def hilbert_index(col: Tensor, row: Tensor, bits: int = BITS) -> Tensor:
    """Return the position on the curve of each place, int64, from 0 to 4^bits − 1.

    From the coarsest quadrant to the finest: two bits say which quarter comes in which order, then
    the quarter is turned so that its curve starts where the one before ended.
    """
    x, y = col.long(), row.long()
    index = torch.zeros_like(x)
    for bit in range(bits - 1, -1, -1):
        side = 1 << bit
        right, lower = (x & side) > 0, (y & side) > 0
        index += side * side * ((3 * right) ^ lower.long())
        turned = ~lower
        mirrored = turned & right
        x, y = torch.where(mirrored, side - 1 - x, x), torch.where(mirrored, side - 1 - y, y)
        x, y = torch.where(turned, y, x), torch.where(turned, x, y)
    return index
