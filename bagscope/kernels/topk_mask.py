"""Stochastic top-K masking: some of each bag's strongest tiles are left out of a branch.

    of the k highest scores of a bag and branch, ranked by score and then by row,
    each is masked with probability p                       (`exactly=False`, the paper's text)
    or a random ⌊k p⌋ of them are                           (`exactly=True`, the original's code)

with k no larger than the bag. A bag is never masked whole: where that was drawn, the tile with the
largest draw stays. The draws are a hash of (seed, step, bag's name, branch, rank), so a bag gets
the same mask alone or packed, on any device. Masked scores get no gradient.

Shapes: scores (T, K), mask (T, K), True where masked. Memory: on a GPU two orders of the tiles,
16 T K bytes, and no synchronisation; on a processor one bag's k highest.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose
from bagscope.kernels.hashing import hashed, key_of_step, uniform
from bagscope.kernels.segments import bag_of_tile, require_borders

_SCHEMA = (
    "(Tensor scores, Tensor cu_seqlens, Tensor bag_ids, int k, float p, SymInt seed, SymInt step, "
    "bool exactly) -> Tensor"
)


def topk_mask_reference(
    scores: Tensor,
    cu_seqlens: Tensor,
    bag_ids: Tensor,
    k: int,
    p: float,
    seed: int,
    step: int,
    exactly: bool,
) -> Tensor:
    """Return the mask, bag by bag and branch by branch."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    draws = _draws(bag_ids, scores.shape[1], k, seed, step)
    for bag, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        count = min(k, stop - start)
        for branch in range(scores.shape[1]):
            ranked = scores[start:stop, branch].sort(descending=True, stable=True).indices[:count]
            draw = draws[bag, branch, :count]
            if exactly:
                chosen = draw.argsort(stable=True)[: int(count * p + _SLACK)]
            else:
                chosen = (draw < p).nonzero()[:, 0]
            if len(chosen) == stop - start:
                chosen = chosen[chosen != draw.argmax()] if count else chosen
            mask[start + ranked[chosen], branch] = True
    return mask


_SLACK = 1e-9
"""0.6 of 10 tiles is 6, though 10 × 0.6 could come out below."""


def topk_mask(
    scores: Tensor,
    cu_seqlens: Tensor,
    k: int,
    p: float,
    *,
    seed: int,
    step: int,
    bag_ids: Tensor | None = None,
    exactly: bool = False,
) -> Tensor:
    """Return which tiles are left out of which branch: (T, K) bool.

    Args:
        scores: (T, K) logits, higher is stronger.
        cu_seqlens: (B + 1,) int32.
        k: how many of each bag's highest scores may be masked.
        p: probability, or share, of masking these.
        seed: of the run.
        step: of the training; each step masks anew.
        bag_ids: (B,) int64 names that follow a bag from batch to batch; its place where left out.
        exactly: mask ⌊k p⌋ of the k highest, not each of them with probability p.

    Raises:
        ValueError: shapes or numbers that do not fit.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores are {tuple(scores.shape)}; pass (tiles, branches)")
    if k < 0 or not 0.0 <= p <= 1.0:
        raise ValueError(f"k is {k} and p is {p}; k must not be negative, p lies from 0 to 1")
    bags = len(cu_seqlens) - 1
    if bag_ids is None:
        bag_ids = torch.arange(bags, device=scores.device)
    elif bag_ids.shape != (bags,) or bag_ids.dtype != torch.int64:
        raise ValueError(f"bag_ids is {bag_ids.dtype} {tuple(bag_ids.shape)}; pass int64 ({bags},)")
    found: Tensor = torch.ops.bagscope.topk_mask(
        scores.detach(), cu_seqlens, bag_ids, k, p, seed, step, exactly
    )
    return found


@torch.library.custom_op("bagscope::topk_mask", mutates_args=(), schema=_SCHEMA)
def _topk_mask(
    scores: Tensor,
    cu_seqlens: Tensor,
    bag_ids: Tensor,
    k: int,
    p: float,
    seed: int,
    step: int,
    exactly: bool,
) -> Tensor:
    require_borders(cu_seqlens, len(scores))
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if not mask.numel() or not k:
        return mask
    way = choose("topk_mask", scores)
    if way == "reference":
        return topk_mask_reference(scores, cu_seqlens, bag_ids, k, p, seed, step, exactly)
    draws = _draws(bag_ids, scores.shape[1], k, seed, step)
    chosen = _chosen(draws, cu_seqlens.diff().long(), p, exactly)
    if way == "cpu":
        return _mark_by_bag(mask, scores, cu_seqlens, chosen)
    ranks, bags = _ranks(scores, cu_seqlens)
    branches = torch.arange(scores.shape[1], device=scores.device)
    is_masked: Tensor = chosen[bags[:, None], branches, ranks.clamp_max(k - 1)] & (ranks < k)
    return is_masked


@_topk_mask.register_fake
def _topk_mask_fake(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _chosen(draws: Tensor, lengths: Tensor, p: float, exactly: bool) -> Tensor:
    """Return which ranks of each bag and branch are masked: (B, K, k) bool."""
    k = draws.shape[-1]
    counts = lengths.clamp_max(k)[:, None, None]
    is_there = torch.arange(k, device=draws.device) < counts
    draws = torch.where(is_there, draws, 2.0)
    if exactly:
        place = draws.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        chosen = place < (counts * p + _SLACK).long()
    else:
        chosen = is_there & (draws < p)
    is_whole = chosen.sum(-1, keepdim=True) == lengths[:, None, None]
    spared = torch.where(is_there, draws, -1.0).argmax(-1, keepdim=True)
    allowed: Tensor = chosen & ~(is_whole & (torch.arange(k, device=draws.device) == spared))
    return allowed


def _mark_by_bag(mask: Tensor, scores: Tensor, cu_seqlens: Tensor, chosen: Tensor) -> Tensor:
    for bag, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        if stop > start:
            ranked = _highest(scores[start:stop], chosen.shape[-1])
            mask[start:stop].scatter_(0, ranked, chosen[bag, :, : len(ranked)].T)
    return mask


def _highest(scores: Tensor, k: int) -> Tensor:
    """Return the rows of the k highest scores per column; of equal ones the upper row first."""
    if k >= len(scores):
        return scores.sort(dim=0, descending=True, stable=True).indices
    # Equal scores at the edge are few, or a sort is as good.
    limit = scores.topk(k, dim=0).values[-1]
    columns = []
    for column, lowest in zip(scores.T, limit, strict=True):
        rows = (column >= lowest).nonzero()[:, 0]
        columns.append(rows[column[rows].sort(descending=True, stable=True).indices[:k]])
    return torch.stack(columns, 1)


def _ranks(scores: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return each tile's rank in its bag, (T, K), and its bag, (T,), all bags in one sort."""
    bags = bag_of_tile(cu_seqlens, len(scores))
    order = scores.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, bags[order].argsort(dim=0, stable=True))
    places = torch.arange(len(scores), device=scores.device) - cu_seqlens.long()[bags]
    ranks = torch.empty_like(order).scatter_(0, order, places[:, None].expand_as(order))
    return ranks, bags


def _draws(bag_ids: Tensor, branches: int, k: int, seed: int, step: int) -> Tensor:
    """Return numbers in [0, 1) that depend on their names alone: (B, K, k) float64."""
    device = bag_ids.device
    key = hashed(key_of_step(seed, step, device) ^ bag_ids)[:, None, None]
    key = hashed(key ^ torch.arange(branches, device=device)[:, None])
    return uniform(hashed(key ^ torch.arange(k, device=device)))
