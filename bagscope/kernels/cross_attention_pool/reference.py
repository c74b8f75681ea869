"""`cross_attention_pool` in plain torch, one bag after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def cross_attention_pool_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled (B, m, H, dv), lse (B, m, H) and weights (T, m, H), or (0, m, H)."""
    pooled, lses, weights = [], [], [k.new_zeros((0, *q.shape[1:3]), dtype=q.dtype)]
    for queries, (a, b) in zip(q, pairwise(cu_seqlens.tolist()), strict=True):
        scores = scale * torch.einsum("mhd,thd->tmh", queries, k[a:b].to(q.dtype))
        found = torch.softmax(scores, 0)
        pooled.append(torch.einsum("tmh,the->mhe", found, v[a:b].to(q.dtype)))
        lses.append(torch.logsumexp(scores, 0))
        if return_weights:
            weights.append(found)
    return torch.stack(pooled), torch.stack(lses), torch.cat(weights)
