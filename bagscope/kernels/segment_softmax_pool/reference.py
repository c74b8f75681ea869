"""Softmax pooling per bag in plain torch: the truth that the other paths are compared with."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def segment_softmax_pool_reference(
    scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pooled (B,K,D), lse (B,K), entropy (B,K) and the largest weight (B,K), bag by bag."""
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    pooled, lse, entropy, top = [], [], [], []
    for start, stop in pairwise(cu_seqlens.tolist()):
        e = scores[start:stop]
        filled = e.new_zeros(()) if stop == start else (e > -torch.inf).any(0)
        safe = torch.where(e > -torch.inf, e, 0.0)
        logsum = torch.where(filled.bool(), e, 0.0).logsumexp(0) if stop > start else e.sum(0)
        a = torch.where(e > -torch.inf, (safe - logsum).exp(), 0.0)
        pooled.append(a.T @ h[start:stop])
        entropy.append(torch.where(filled.bool(), logsum - (a * safe).sum(0), 0.0))
        lse.append(torch.where(filled.bool(), logsum, -torch.inf))
        top.append(a.detach().amax(0) if stop > start else torch.zeros_like(logsum))
    return torch.stack(pooled), torch.stack(lse), torch.stack(entropy), torch.stack(top)
