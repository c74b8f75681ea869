"""Attention in linear time: a bag is gathered into one small matrix, which every tile then asks.

    out_i = φ(q_i)ᵀ (Σ_j φ(k_j) v_jᵀ) · n_i         j: tiles of i's bag

with n_i = 1 / (φ(q_i) · Σ_j φ(k_j) + ε) ("denominator"), 1 ("none", as in Lightning attention,
where a norm follows) or 1 / N of the bag ("length"). Non-causal, no decay.

Shapes: T tiles, B bags, H heads, d and dv features per head: q and k (T, H, d), v (T, H, dv), out
(T, H, dv). The sums are float32 whatever the inputs are.

Kept for backward: the inputs and the (B, H, d, dv) sums; features φ are computed again. Memory
beyond that is a chunk of rows (CPU), or at most 1/4 of k and v (GPU). 4·T·H·d·dv operations
forward, twice as many backward.

Relatives: `agent_attention`, `flow_attention`, `inline_attention`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose
from bagscope.kernels.linear_attention.agent import agent_attention
from bagscope.kernels.linear_attention.halves import OP, ask, gather, lengths
from bagscope.kernels.linear_attention.reference import linear_attention_reference
from bagscope.kernels.linear_attention.relatives import flow_attention, inline_attention

__all__ = [
    "agent_attention",
    "flow_attention",
    "inline_attention",
    "linear_attention",
    "linear_attention_reference",
]

FeatureMap = Literal["elu+1", "silu", "identity", "relu"]
Normaliser = Literal["denominator", "none", "length"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    feature_map: FeatureMap = "elu+1",
    normalise: Normaliser = "denominator",
    eps: float = 1e-6,
) -> Tensor:
    """Return (T, H, dv).

    Args:
        q: queries, (T, H, d).
        k: keys, (T, H, d).
        v: values, (T, H, dv).
        cu_seqlens: (B + 1,) int32.
        feature_map: φ.
        normalise: what the sum is divided by.
        eps: added to the denominator.

    Raises:
        ValueError: shapes or borders do not belong together, or a word is unknown.
    """
    for word, known in ((feature_map, get_args(FeatureMap)), (normalise, get_args(Normaliser))):
        if word not in known:
            raise ValueError(f"{word!r} is not known; choose one of {', '.join(known)}")
    if q.shape != k.shape or q.ndim != 3 or v.ndim != 3 or v.shape[:2] != k.shape[:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}; pass (T, H, d), (T, H, d) and (T, H, dv)")
    if not torch.compiler.is_compiling() and choose(OP, q) == "reference":
        return linear_attention_reference(q, k, v, cu_seqlens, feature_map, normalise, eps)
    kv, total = gather(k, v, cu_seqlens, feature_map)
    if normalise == "denominator":
        return ask(q, kv, cu_seqlens, feature_map, total=total, eps=eps)
    if normalise == "length":
        kv = kv / lengths(cu_seqlens, kv)[..., None]
    return ask(q, kv, cu_seqlens, feature_map)
