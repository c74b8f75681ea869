"""A 3 × 3 depthwise kernel on the tissue's lattice, which has holes and a ragged edge.

    out_t = Σ_{a, b ∈ {−1, 0, 1}} w[channel, a, b] x(column + b, row + a)      0 where no tile is

On a full rectangle this is a convolution with zeros around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAPS = 9
"""Row by row, as the weights of a convolution lie."""
_SIDE = 1 << 20
"""Columns of a lattice, at most; bags of a million tiles are a thousand on a side."""


def places_around(grid: Tensor, bag: Tensor) -> Tensor:
    """Return the tile (tiles, 9) at each place around each tile of its bag; none: their number."""
    tiles = len(grid)
    least = grid.long().amin(0) if tiles else grid.new_zeros(2, dtype=torch.long)
    column, row = (grid.long() - least + 1).unbind(1)
    key = (bag * _SIDE + row) * _SIDE + column
    order = torch.argsort(key, stable=True)
    known = key[order]
    steps = torch.arange(-1, 2, device=key.device)
    apart = (steps[:, None] * _SIDE + steps[None]).flatten()
    wanted = key[:, None] + apart
    at = torch.searchsorted(known, wanted).clamp(max=max(tiles - 1, 0))
    return torch.where(known[at] == wanted, order[at], tiles) if tiles else wanted


def around(x: Tensor, grid: Tensor, bag: Tensor, kernels: Tensor) -> Tensor:
    """Return the sum over what is around each tile (tiles, d).

    Args:
        x: (tiles, d).
        grid: (tiles, 2) column and row.
        bag: (tiles,) int64; a tile of another bag is not there.
        kernels: (d, 9), or (B, d, 9) with one of each bag.
    """
    near = places_around(grid, bag)
    there = torch.cat([x, x.new_zeros(1, x.shape[1])])
    out = torch.zeros_like(x)
    for tap in range(TAPS):
        kernel = kernels[..., tap]
        out = out + there[near[:, tap]] * (kernel[bag] if kernel.ndim == 2 else kernel)
    return out
