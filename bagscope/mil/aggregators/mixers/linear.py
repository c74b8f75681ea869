"""Linear attention: φ(q)·φ(k) over its sum, φ = elu + 1; a bag costs a matrix, not N² weights."""

from __future__ import annotations

from torch import Tensor

from bagscope.kernels.linear_attention import linear_attention
from bagscope.mil.aggregators.mixers.base import FusedMixer
from bagscope.mil.aggregators.mixers.rows import Rows


class Linear(FusedMixer):
    """Every tile asks what its bag was gathered into."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv)."""
        return linear_attention(q, k, v, rows.cu_seqlens)
