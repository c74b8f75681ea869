"""Projection and attention logits of every tile, by one gate or two, for one branch or several.

h = act(W x + b)                    (T, hidden)
e = w·(gate(V h) ⊙ σ(U h)) + c      (T, K); without `gated` no second factor
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.gated_scores import gated_scores
from bagscope.mil.aggregators.layers import Activation, Projection, affine, draw_seed
from bagscope.mil.bags import Bags

Gate = Literal["tanh", "relu"]


class GatedAttention(nn.Module):
    """The parameters of attention pooling, and the fused operations on them.

    Without `hidden` there is no projection: h is the tile.
    """

    def __init__(
        self,
        features: int,
        hidden: int | None,
        width: int,
        branches: int = 1,
        *,
        gated: bool = True,
        gate: Gate = "tanh",
        activation: Activation = "relu",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
        projection_bias: bool = True,
        attention_bias: bool = True,
    ) -> None:
        super().__init__()
        self.projection: Projection | None = None
        if hidden is not None:
            self.projection = Projection(
                features, hidden, bias=projection_bias, activation=activation, dropout=dropout
            )
        hidden = hidden or features
        self.v = nn.Linear(hidden, width, bias=attention_bias)
        self.u = nn.Linear(hidden, width, bias=attention_bias) if gated else None
        self.w = nn.Linear(width, branches, bias=attention_bias)
        self.gate: Gate = gate
        self.gate_dropout = gate_dropout

    def forward(self, bags: Bags) -> PooledBags:
        """Return what the branches pool from every bag, in one pass over the features."""
        projection = self.projection
        if projection is None:
            return gated_attention_pool(bags.features, bags.cu_seqlens, **self._gates(bags))
        dropout = projection.dropout if self.training else 0.0
        return gated_attention_pool(
            bags.features,
            bags.cu_seqlens,
            projection=affine(projection),
            activation=projection.activation,
            projection_dropout_p=dropout,
            **self._gates(bags),
        )

    def projected(self, features: Tensor, seed: int = 0) -> Tensor:
        """Return h (T, hidden) of features (T, D); `seed` keys the draws of dropout."""
        h: Tensor = features if self.projection is None else self.projection(features, seed)
        return h

    def scores(self, h: Tensor, bags: Bags) -> Tensor:
        """Return the attention's logits (T, K) of projected tiles (T, hidden)."""
        return gated_scores(h, **self._gates(bags))

    def _gates(self, bags: Bags) -> dict[str, Any]:
        weight_v, bias_v = affine(self.v)
        weight_u, bias_u = affine(self.u) if self.u is not None else (None, None)
        weight_w, bias_w = affine(self.w)
        dropout = 0.0 if self.projection is None else self.projection.dropout
        draws = self.training and (self.gate_dropout or dropout)
        return {
            "weight_v": weight_v,
            "bias_v": bias_v,
            "weight_u": weight_u,
            "bias_u": bias_u,
            "weight_w": weight_w,
            "bias_w": bias_w,
            "gate": self.gate,
            "dropout_p": self.gate_dropout if self.training else 0.0,
            # A compiled graph need not be made anew at every step where nothing is drawn.
            "seed": draw_seed(bags) if draws else 0,
        }
