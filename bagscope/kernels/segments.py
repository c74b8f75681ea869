"""Bags laid end to end: the borders, and reductions within them.

Shapes: T tiles of all bags together, B bags, K columns. `cu_seqlens` is (B + 1,) int32: bag b holds
the rows from `cu_seqlens[b]` to `cu_seqlens[b + 1]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ROWS = 2048
"""Rows that the streaming paths work on at a time: larger chunks leave the cache."""


def require_borders(cu_seqlens: Tensor, tiles: int) -> None:
    """Refuse borders that are not (B + 1,) int32, rising, from 0 to `tiles`.

    On a GPU and under torch.compile only shape and dtype are looked at: values would cost a
    synchronisation, and are not there yet.

    Raises:
        ValueError: names what is wrong.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; pass int32 (bags + 1,)"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != tiles or borders != sorted(borders):
        raise ValueError(
            f"cu_seqlens runs from {borders[0]} to {borders[-1]}; "
            f"it must rise from 0 to the {tiles} tiles"
        )


def borders_of(lengths: Tensor) -> Tensor:
    """Return the borders (B + 1,) int32 of bags of these lengths (B,), laid end to end."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def bag_of_tile(cu_seqlens: Tensor, tiles: int) -> Tensor:
    """Return the bag of every tile: (T,) int64."""
    lengths = cu_seqlens.diff().long()
    bags = torch.arange(len(lengths), device=cu_seqlens.device)
    return torch.repeat_interleave(bags, lengths, output_size=tiles)


def pieces(cu_seqlens: Tensor, rows: int = CHUNK_ROWS) -> Iterator[tuple[int, int, list[Piece]]]:
    """Yield (start, stop, pieces of bags) of each chunk of at most `rows` rows.

    Empty bags have no pieces.
    """
    borders = cu_seqlens.tolist()
    bag = 0
    for start in range(0, borders[-1], rows):
        stop = min(start + rows, borders[-1])
        found: list[Piece] = []
        at = start
        while at < stop:
            while borders[bag + 1] <= at:
                bag += 1
            end = min(stop, borders[bag + 1])
            found.append((bag, at, end))
            at = end
        yield start, stop, found


Piece = tuple[int, int, int]
"""(bag, first row, row after the last) of the part of a bag that lies in a chunk."""
