"""Bags cut into chunks of rows, so that one long bag keeps a whole GPU busy.

The table has a fixed size, so that no number has to come back from the GPU: surplus chunks are
empty, and belong to the last bag.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """C chunks, in the order of their rows.

    Attributes:
        bag: (C,) int64, the bag of each.
        start: (C,) int64, its first row.
        stop: (C,) int64, the row after its last.
        offsets: (B + 1,) int64, bag b has the chunks from offsets[b] to offsets[b + 1].
    """

    bag: Tensor
    start: Tensor
    stop: Tensor
    offsets: Tensor

    def total(self, partial: Tensor) -> Tensor:
        """Return the sums of (C, ...) over each bag's chunks: (B, ...), always in one order."""
        return self._reduce(partial, "sum", 0.0)

    def peak(self, partial: Tensor) -> Tensor:
        """Return the maxima of (C, ...) over each bag's chunks: (B, ...)."""
        return self._reduce(partial, "max", float("-inf"))

    def _reduce(self, partial: Tensor, how: str, initial: float) -> Tensor:
        reduced: Tensor = torch.segment_reduce(
            partial.flatten(1), how, offsets=self.offsets, axis=0, unsafe=True, initial=initial
        )
        return reduced.view(-1, *partial.shape[1:])


def cut(cu_seqlens: Tensor, tiles: int, rows: int) -> Chunks:
    """Return chunks of at most `rows` rows; no chunk crosses a border."""
    borders = cu_seqlens.long()
    bags = len(borders) - 1
    counts = (borders.diff() + rows - 1) // rows
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    index = torch.arange(tiles // rows + bags, device=borders.device)
    bag = torch.searchsorted(offsets[1:], index, right=True).clamp(max=max(bags - 1, 0))
    start = torch.minimum(borders[bag] + (index - offsets[bag]) * rows, borders[bag + 1])
    stop = torch.minimum(start + rows, borders[bag + 1])
    return Chunks(bag, start, stop, offsets)
