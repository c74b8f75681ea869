"""Gated attention pooling in plain torch: the truth that the other paths are compared with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bagscope.kernels.gated_scores.dropout import tile_dropout
from bagscope.kernels.gated_scores.reference import gated_scores_reference
from bagscope.kernels.segment_softmax_pool.reference import segment_softmax_pool_reference

PROJECTION_SEED = 0x5BD1E995
"""Told apart from the gates' seed by this, so that both draw numbers of their own."""


def gated_attention_pool_reference(
    x: Tensor,
    cu_seqlens: Tensor,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_u: Tensor | None,
    bias_u: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    mask: Tensor | None = None,
    *,
    activation: str = "relu",
    gate: str = "tanh",
    dropout_p: float = 0.0,
    projection_dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pooled (B,K,D), scores (T,K), lse (B,K) and entropy (B,K)."""
    h = x
    if projection_weight is not None:
        h = functional.linear(x, projection_weight, projection_bias)
        if activation != "identity":
            h = functional.relu(h) if activation == "relu" else functional.gelu(h)
        if projection_dropout_p:
            seed_of_h = seed ^ PROJECTION_SEED
            h = h * tile_dropout(len(h), h.shape[1], projection_dropout_p, seed_of_h, h)
    gates = (weight_v, bias_v, weight_u, bias_u, weight_w, bias_w)
    scores = gated_scores_reference(h, *gates, gate=gate, dropout_p=dropout_p, seed=seed)
    pooled, lse, entropy, _ = segment_softmax_pool_reference(scores, h, cu_seqlens, mask)
    return pooled, scores, lse, entropy
