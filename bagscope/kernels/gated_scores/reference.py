"""Attention logits in plain torch: the truth that the other paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels.gated_scores.dropout import gate_dropout, tile_dropout


def gated_scores_reference(
    h: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_u: Tensor | None,
    bias_u: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    gate: str = "tanh",
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Return e = w·(gate(V h + b) ⊙ σ(U h + b')) + c, (T, K); without U the second factor is 1."""
    found = functional.linear(h, weight_v, bias_v)
    found = found.tanh() if gate == "tanh" else found.relu()
    if weight_u is not None:
        found = found * torch.sigmoid(functional.linear(h, weight_u, bias_u))
    if p := gate_dropout(dropout_p, weight_u is not None):
        found = found * tile_dropout(len(found), found.shape[1], p, seed, found)
    return functional.linear(found, weight_w, bias_w)
