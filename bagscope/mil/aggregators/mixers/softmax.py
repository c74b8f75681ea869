"""Exact attention between all tiles of a bag: softmax(q·k / √d), with heads."""

from __future__ import annotations

from torch import Tensor

from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.varlen_self_attention import varlen_self_attention
from bagscope.mil.aggregators.mixers.base import FusedMixer
from bagscope.mil.aggregators.mixers.rows import Rows


class Softmax(FusedMixer):
    """Every tile looks at every tile of its bag."""

    reads_class = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv)."""
        return varlen_self_attention(q, k, v, rows.cu_seqlens)

    def class_weights(self, x: Tensor, rows: Rows) -> Tensor:
        """Return how much each bag's class token takes of each row (T,)."""
        # A class token is nowhere, so this is its row of ALiBi too.
        q, k, _ = self.split(x)
        asked = q[rows.cu_seqlens[:-1].long()][:, None]
        _, _, weights = cross_attention_pool(asked, k, k, rows.cu_seqlens, return_weights=True)
        assert weights is not None, "they were asked for"
        return weights[:, 0].mean(1)
