"""Flow attention (Wu et al. 2022), non-causal: competition among sources, allocation to sinks."""

from __future__ import annotations

from torch import Tensor, nn

from bagscope.kernels.linear_attention import flow_attention
from bagscope.mil.aggregators.layers import linear
from bagscope.mil.aggregators.mixers.base import Mixer, MixerOptions
from bagscope.mil.aggregators.mixers.rows import Rows, heads_of
from bagscope.mil.aggregators.rolling import pulled_through


class Flow(Mixer):
    """Every tile gets of a flow that is conserved; also between two sets of rows (`across`)."""

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__(width, options, layer, layers)
        self.query_projection = nn.Linear(width, width)
        self.key_projection = nn.Linear(width, width)
        self.value_projection = nn.Linear(width, width)
        self.out_projection = nn.Linear(width, width)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what is added to the residual stream."""
        return self.across(x, x, rows.cu_seqlens, rows.cu_seqlens)

    def across(self, x: Tensor, stored: Tensor, cu_seqlens: Tensor, cu_stored: Tensor) -> Tensor:
        """Return what rows x (T, width) get of stored ones (T', width) of the same bags."""
        q = heads_of(linear(x, self.query_projection), self.heads)
        k = heads_of(linear(stored, self.key_projection), self.heads)
        v = heads_of(linear(stored, self.value_projection), self.heads)
        out = flow_attention(q, k, v, cu_seqlens, cu_stored)
        return linear(out.flatten(1).to(x.dtype), self.out_projection)

    def pulled(self, x: Tensor, rows: Rows, weights: Tensor) -> Tensor | None:
        """Return Σ_i w_i A_ij (T,), of what a row gets in shares of the whole."""
        q = heads_of(linear(x, self.query_projection), self.heads)
        k = heads_of(linear(x, self.key_projection), self.heads)
        return pulled_through(
            lambda v: flow_attention(q, k, v, rows.cu_seqlens), weights, q, adds_up=False
        )
