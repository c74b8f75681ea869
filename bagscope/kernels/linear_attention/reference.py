"""`linear_attention` in plain torch, one bag after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def feature(x: Tensor, feature_map: str) -> Tensor:
    """Return φ(x)."""
    if feature_map == "elu+1":
        return F.elu(x) + 1
    if feature_map == "silu":
        return F.silu(x)
    return F.relu(x) if feature_map == "relu" else x


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    feature_map: str,
    normalise: str,
    eps: float,
) -> Tensor:
    """Return (T, H, dv)."""
    out = [v.new_zeros(0, *v.shape[1:])]
    for a, b in pairwise(cu_seqlens.tolist()):
        queries, keys = feature(q[a:b], feature_map), feature(k[a:b], feature_map)
        mixed = torch.einsum("ihd,jhd,jhe->ihe", queries, keys, v[a:b])
        if normalise == "denominator":
            mixed = mixed / (torch.einsum("ihd,jhd->ih", queries, keys) + eps)[..., None]
        out.append(mixed / (b - a) if normalise == "length" else mixed)
    return torch.cat(out)
