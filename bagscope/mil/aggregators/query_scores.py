"""What learned queries think of every tile: the scores and log weights behind their pooling.

The pooling never holds them; here they are made again, since a logarithm of weights that have
underflowed would say nothing of the tiles.

T tiles, B bags, m queries, H heads, d features per head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile


def query_scores(q: Tensor, k: Tensor, scale: float, bag: Tensor | None = None) -> Tensor:
    """Return scale · q · k: (T, m, H), in q's precision or float32, whichever is more.

    Args:
        q: queries of all bags, (m, H, d), or of each, (B, m, H, d).
        k: keys, (T, H, d).
        scale: of the scores.
        bag: (T,) whose queries each tile meets, for queries of each bag.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    if bag is None:
        return scale * torch.einsum("mhd,thd->tmh", q, k)
    return scale * torch.einsum("tmhd,thd->tmh", q[bag], k)


def log_weights(scores: Tensor, lse: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the log weights (T, m, H) of scores (T, m, H), with lse (B, m, H)."""
    return scores - lse[bag_of_tile(cu_seqlens, len(scores))]


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """Return the log of each tile's mean weight over queries and heads: (T, 1) of (T, m, H)."""
    columns = log_weights.flatten(1)
    return columns.logsumexp(1, keepdim=True) - math.log(columns.shape[1])
