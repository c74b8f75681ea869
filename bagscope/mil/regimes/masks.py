"""Which tiles a student does not see: by rank of a score within each bag, and by chance.

With N tiles in a bag, of the tiles ranked by score, highest or lowest first:

    candidates   the first ⌈N · share / within⌉ of them
    masked       a random ⌈candidates · within⌉ of these        (`within` 1: all of them)

Where share / within is above 1, all tiles are candidates and ⌈N · share⌉ of them are masked; so a
random mask is one with `within` = share. Several columns of scores vote: each names its own
candidates, and those named most often are the candidates; of equally many votes, the one with the
lower sum of ranks comes first, then the upper row. Scores that are equal: the upper row first.

Everything here is counted on the device of the scores; nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.regimes.draws import ordered
from bagscope.specs import Spec, refuse_unused

HIGH, LOW, RANDOM = 0, 1, 2
"""What a draw is for."""

Draw = Callable[[int], Tensor]
"""From what it is for to a number in [0, 1) for each tile (T,)."""


class MaskSpec(Spec):
    """Shares of a bag's tiles that the student does not see; a tile may be of several kinds."""

    high: float = Field(default=0.0, ge=0, le=1, description="of those with the highest scores")
    high_within: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the share `high` is a random one of this size among the highest high / this",
    )
    high_schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="of `high`: constant, or a cosine that ends at 0"
    )
    low: float = Field(default=0.0, ge=0, le=1, description="of those with the lowest scores")
    random: float = Field(default=0.0, ge=0, le=1, description="of all, whatever their score")

    @model_validator(mode="after")
    def _used(self) -> MaskSpec:
        if not self.high:
            refuse_unused(self, "high_within", "high_schedule", of="high", now="high is 0")
        return self

    @property
    def are_any(self) -> bool:
        """Return whether any tile is ever masked."""
        return max(self.high, self.low, self.random) > 0

    def high_at(self, progress: float) -> float:
        """Return the share of the highest at a time of the training, from 0 to 1."""
        if self.high_schedule == "constant":
            return self.high
        return self.high * (1 + math.cos(math.pi * progress)) / 2


def masked_tiles(
    scores: Tensor, cu_seqlens: Tensor, spec: MaskSpec, draw: Draw, *, progress: float = 0.0
) -> Tensor:
    """Return which tiles are masked: (T,) bool, the union of all kinds.

    A bag that would be masked whole keeps its tile with the highest score.

    Args:
        scores: (T, K) without NaN.
        cu_seqlens: (B + 1,) int32.
        spec: the shares.
        draw: of random numbers.
        progress: share of the training that is done.
    """
    found = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    if high := spec.high_at(progress):
        found |= ranked_share(scores, cu_seqlens, high, within=spec.high_within, numbers=draw(HIGH))
    if spec.low:
        found |= ranked_share(scores, cu_seqlens, spec.low, lowest=True)
    if spec.random:
        found |= ranked_share(
            scores,
            cu_seqlens,
            spec.random,
            within=spec.random,
            lowest=True,
            numbers=draw(RANDOM),
        )
    return found & ~_spared(found, scores, cu_seqlens)


def ranked_share(
    scores: Tensor,
    cu_seqlens: Tensor,
    share: float,
    *,
    within: float = 1.0,
    lowest: bool = False,
    numbers: Tensor | None = None,
) -> Tensor:
    """Return a share of each bag's tiles by their rank: (T,) bool.

    Args:
        scores: (T, K).
        cu_seqlens: (B + 1,) int32.
        share: of all tiles, above 0.
        within: the share of the candidates that is taken, by chance where below 1.
        lowest: whether the lowest scores come first, not the highest.
        numbers: (T,) random ones; the candidates with the lowest are taken. Needed below 1.
    """
    ratio = share / within
    if ratio > 1:
        ratio, within = 1.0, share
    bag = bag_of_tile(cu_seqlens, len(scores))
    # In float64, as the originals round: ⌈100 · 0.07⌉ is 8.
    counts = (cu_seqlens.diff().double() * ratio).ceil()
    wanted = scores if lowest else -scores
    ranks = torch.stack([ranked(column, cu_seqlens) for column in wanted.unbind(1)], 1)
    place = ranks[:, 0]
    if scores.shape[1] > 1:
        votes = (ranks < counts[bag][:, None]).sum(1)
        # Votes first, then the sum of ranks, which is below the weight of one vote.
        place = ranked(ranks.sum(1) - votes * (ranks.shape[1] * len(ranks)), cu_seqlens)
    is_candidate = place < counts[bag]
    if within == 1:
        return is_candidate
    assert numbers is not None, "a share by chance needs numbers"
    turn = ranked(torch.where(is_candidate, numbers, torch.inf), cu_seqlens)
    return is_candidate & (turn < (counts * within).ceil()[bag])


def ranked(numbers: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return each tile's place in its bag by rising number: (T,) int64, from 0."""
    rows = ordered(numbers, cu_seqlens)
    places = torch.arange(len(numbers), device=numbers.device)
    return torch.empty_like(rows).scatter_(
        0, rows, places - cu_seqlens.long()[bag_of_tile(cu_seqlens, len(numbers))]
    )


def _spared(masked: Tensor, scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the first tile with the highest score of each bag that is masked whole: (T,) bool."""
    bag = bag_of_tile(cu_seqlens, len(scores))
    left = torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64, device=scores.device)
    left = left.index_add_(0, bag, (~masked).long())
    return (left == 0)[bag] & (ranked(-scores.sum(1), cu_seqlens) == 0)
