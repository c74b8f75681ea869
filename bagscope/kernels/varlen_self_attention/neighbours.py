"""Which tiles may look at which: those within r steps on the tile lattice, found block by block.

Tiles are sorted along a Hilbert curve, bag by bag, and cut into blocks. A block's tiles lie close
together, so that few blocks have anything to say to each other: those whose bounding boxes come
within r. The relation is symmetric, which is why one list serves forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bagscope.kernels.chunks import Chunks, cut
from bagscope.kernels.segments import bag_of_tile, require_borders
from bagscope.kernels.varlen_self_attention.hilbert import hilbert_index

BLOCK = 64
_PAIR_ROWS = 512
_FAR = 1 << 40


class Neighbours(NamedTuple):
    """Blocks of tiles and the blocks near each; make it once per batch, use it in every layer.

    Attributes:
        order: (T,) int64, the tile at each place of the sorted order.
        places: (T, 2) int32, column and row, sorted.
        start: (N,) int64, the first sorted row of each block; empty blocks have none.
        stop: (N,) int64, the row after its last.
        first: (N + 1,) int64, block n is near blocks near[first[n]:first[n + 1]].
        near: (pairs,) int64.
        r: steps, diagonal ones count as one.
    """

    order: Tensor
    places: Tensor
    start: Tensor
    stop: Tensor
    first: Tensor
    near: Tensor
    r: int


def find_neighbours(grid: Tensor, cu_seqlens: Tensor, r: int) -> Neighbours:
    """Return the blocks of tiles and which are within r steps of each other.

    Costs one sort and a comparison of all blocks of 64 tiles with all; on a GPU one number, that of
    the pairs, comes back.

    Args:
        grid: column and row of each tile on its slide's lattice, (T, 2) integers.
        cu_seqlens: (B + 1,) int32.
        r: steps, at least 0.

    Raises:
        ValueError: the grid is not (T, 2) integers, or r is negative.
    """
    if grid.ndim != 2 or grid.shape[1] != 2 or grid.is_floating_point():
        raise ValueError(f"grid is {grid.dtype} {tuple(grid.shape)}; pass integers (T, 2)")
    if r < 0:
        raise ValueError(f"r is {r}; tiles see at least themselves, with r = 0")
    order, first, near = _find(grid, cu_seqlens, r)
    blocks = cut(cu_seqlens, len(grid), BLOCK)
    return Neighbours(order, grid[order].int(), blocks.start, blocks.stop, first, near, r)


@torch.library.custom_op("bagscope::find_neighbours", mutates_args=())
def _find(grid: Tensor, cu_seqlens: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    require_borders(cu_seqlens, len(grid))
    bags = bag_of_tile(cu_seqlens, len(grid))
    corner = grid.amin(0) if len(grid) else 0
    col, row = (grid.long() - corner).unbind(1)
    along = torch.argsort(hilbert_index(col, row), stable=True)
    order = along[torch.argsort(bags[along], stable=True)]
    blocks = cut(cu_seqlens, len(grid), BLOCK)
    count = len(blocks.start)
    low, high = _boxes(grid[order].long(), blocks)
    counts, near = [], []
    for begin in range(0, count, _PAIR_ROWS):
        some = slice(begin, begin + _PAIR_ROWS)
        apart = torch.maximum(low[None] - high[some, None], low[some, None] - high[None]).amax(-1)
        close = (apart <= r) & (blocks.bag[some, None] == blocks.bag[None])
        counts.append(close.sum(1))
        near.append(close.nonzero()[:, 1])
    nothing = order.new_zeros(0)
    first = torch.nn.functional.pad(torch.cat([nothing, *counts]).cumsum(0), (1, 0))
    return order, first, torch.cat([nothing, *near])


def _boxes(places: Tensor, blocks: Chunks) -> tuple[Tensor, Tensor]:
    """Return the corners (N, 2) of the boxes around each block; an empty block's is nowhere."""
    empty = (blocks.start == blocks.stop)[:, None]
    if not len(places):
        return places.new_full((len(empty), 2), _FAR), places.new_full((len(empty), 2), -_FAR)
    rows = blocks.start[:, None] + torch.arange(BLOCK, device=places.device)
    inside = torch.minimum(rows, blocks.stop[:, None] - 1).clamp(min=0)
    low, high = places[inside].aminmax(dim=1)
    return low.masked_fill(empty, _FAR), high.masked_fill(empty, -_FAR)


@_find.register_fake
def _(grid: Tensor, cu_seqlens: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    tiles, borders = grid.shape[0], cu_seqlens.shape[0]
    count = tiles // BLOCK + borders - 1
    return (
        grid.new_empty(tiles, dtype=torch.long),
        grid.new_empty(count + 1, dtype=torch.long),
        grid.new_empty(pairs, dtype=torch.long),
    )
