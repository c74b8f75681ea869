"""How PackMIL takes bags apart and packs them: shares, capacity, next-fit.

A part is some tiles of every bag of a step: rows (t,) int64, each bag's together and bags in order,
and borders (B + 1,) int32. All of it goes by ranks in a random order, so draws come from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile, borders_of


class Part(NamedTuple):
    """Some tiles of every bag."""

    rows: Tensor
    cu_seqlens: Tensor

    @property
    def lengths(self) -> Tensor:
        """Return how many tiles each bag has in it: (B,) int64."""
        return self.cu_seqlens.diff().long()


def split(
    order: Tensor, cu_seqlens: Tensor, share: float, *, shortest: int = 0, borrow: bool = False
) -> tuple[Part, Part]:
    """Return the main part of every bag, a share of its tiles, and the residual, the others.

    A bag of fewer than `shortest` tiles, or of one, is in both as a whole; no part is empty.

    Args:
        order: (T,) rows, each bag's shuffled within its borders; the first go into the main part.
        cu_seqlens: (B + 1,) of the bags.
        share: of a bag's tiles that go into the main part, rounded down; above 0 and below 1.
        shortest: tiles of a bag that is split.
        borrow: whether a part of fewer than `shortest` tiles takes what it lacks from the other,
            which keeps them.
    """
    lengths = cu_seqlens.diff().long()
    first = (lengths.double() * share).long()
    first = torch.minimum(first.clamp(min=1), (lengths - 1).clamp(min=1))
    last = lengths - first
    if borrow:
        first, last = first.clamp(min=shortest), last.clamp(min=shortest)
    is_whole = lengths < max(shortest, 2)
    first, last = (torch.where(is_whole, lengths, count) for count in (first, last))
    bag, rank = _ranks(cu_seqlens, len(order))
    return (
        _chosen(order, bag, rank < first[bag], len(lengths)),
        _chosen(order, bag, rank >= (lengths - last)[bag], len(lengths)),
    )


def cut(part: Part, most: int) -> Part:
    """Return a part with the first so many tiles of each bag: in a random order, any of them."""
    bag, rank = _ranks(part.cu_seqlens, len(part.rows))
    return _chosen(part.rows, bag, rank < most, len(part.cu_seqlens) - 1)


def kept(part: Part, keep: Tensor) -> Part:
    """Return a part with the tiles of some bags only; of the others, (B,) False, it has none."""
    bag, _ = _ranks(part.cu_seqlens, len(part.rows))
    return _chosen(part.rows, bag, keep[bag], len(keep))


def capacity_of(longest: int, share: float, capacity: int, r: int) -> int:
    """Return the most tiles of a pack: twice `capacity` where the longest residual is beyond it.

    Args:
        longest: tiles of the longest bag of the step.
        share: of the main part.
        capacity: of a pack.
        r: tiles that become one.
    """
    return 2 * capacity if int(longest * (1 - share)) // r > capacity else capacity


def next_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Return the pack of each bag: the last one that was opened, or a new one if it is too full.

    Bags come in order and are not cut; one that is longer than a pack has a pack for itself.
    """
    packs: list[int] = []
    pack, filled = 0, 0
    for length in lengths:
        if packs and filled + length > capacity:
            pack, filled = pack + 1, 0
        packs.append(pack)
        filled += length
    return packs


def _ranks(cu_seqlens: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Return the bag (T,) of each place, and which of the bag's places it is (T,)."""
    bag = bag_of_tile(cu_seqlens, tiles)
    return bag, torch.arange(tiles, device=bag.device) - cu_seqlens[:-1].long()[bag]


def _chosen(rows: Tensor, bag: Tensor, is_in: Tensor, bags: int) -> Part:
    counts = torch.bincount(bag[is_in], minlength=bags)
    borders = borders_of(counts)
    return Part(rows[is_in], borders)
