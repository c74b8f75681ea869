"""Lightning attention (TNL): linear attention without a denominator, a norm and a gate behind it.

    q, k, v = SiLU of linear layers without bias
    o_i = Σ_j λ^|i−j| (q_i·k_j) v_j          over the bag, or over j ≤ i
    out = W (norm(o) ⊙ σ(U D x))             D to the width of a head, U back

Without `decay` λ = 1, which is the default for bags, as is j on both sides. With it a head's
λ = exp(−slope · (1 − l / (L − 1) + 1e-5)) in layer l of L. Both sides with decay are a scan
forward, one backward, less what both count: the row itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.linear_attention import linear_attention
from bagscope.kernels.linear_attention.halves import ask, gather
from bagscope.kernels.ssd_scan import ssd_scan
from bagscope.mil.aggregators.layers import linear
from bagscope.mil.aggregators.mamba import reversed_rows
from bagscope.mil.aggregators.mixers.base import Mixer, MixerOptions, Norm
from bagscope.mil.aggregators.mixers.rows import Rows, heads_of


def slopes_of(heads: int) -> list[float]:
    """Return ALiBi's slope of each head: 2^(−8 (h + 1) / H) for H a power of two.

    Of any other H: those of the power of two below, then every second one of the power above.
    """
    below = 2 ** math.floor(math.log2(heads))
    own = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    return own if below == heads else own + slopes_of(2 * below)[::2][: heads - below]


class Lightning(Mixer):
    """Every tile asks the sum of its bag; the size of the answer is the norm's matter."""

    uses = frozenset({"reads", "decay", "norm"})
    rates: Tensor

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__(width, options, layer, layers)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        narrow = width // options.heads
        self.output_gate = nn.Sequential(
            nn.Linear(width, narrow, bias=False), nn.Linear(narrow, width, bias=False)
        )
        self.norm = _norm(options.norm, width)
        ease = 1 - layer / max(1, layers - 1) + 1e-5 if options.decay else 0.0
        rates = -ease * torch.tensor(slopes_of(options.heads))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what is added to the residual stream."""
        q, k = self._asked_and_stored(x)
        v = functional.silu(heads_of(linear(x, self.v_proj), self.heads))
        out = self._attend(q, k, v, rows).flatten(1)
        normed = self.norm(out.to(torch.promote_types(out.dtype, torch.float32))).to(x.dtype)
        first, second = self.output_gate
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear), "made so"
        gate = torch.sigmoid(linear(linear(x, first), second))
        return linear(normed * gate, self.o_proj)

    def pulled(self, x: Tensor, rows: Rows, weights: Tensor) -> Tensor | None:
        """Return Σ_i w_i (q_i·k_j)² / Σ_j (q_i·k_j)²: shares of a row's squares.

        The weights themselves may be negative and add up to anything. None with decay, or forward.
        """
        if self.options.decay or self.options.reads == "forward":
            return None
        return pulled_squares(*self._asked_and_stored(x), rows.cu_seqlens, weights)

    def _asked_and_stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            functional.silu(heads_of(linear(x, self.q_proj), self.heads)),
            functional.silu(heads_of(linear(x, self.k_proj), self.heads)),
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        borders = rows.cu_seqlens
        if self.options.reads == "both" and not self.options.decay:
            return linear_attention(q, k, v, borders, feature_map="identity", normalise="none")
        steps = v.new_ones(v.shape[:2])
        out = ssd_scan(v, steps, self.rates, k, q, None, None, borders)
        if self.options.reads == "forward":
            return out
        back = reversed_rows(borders, len(v))
        again = ssd_scan(v[back], steps, self.rates, k[back], q[back], None, None, borders)
        return out + again[back] - (q * k).sum(-1, keepdim=True) * v


def _norm(name: Norm, width: int) -> nn.Module:
    if name == "layernorm":
        return nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=name == "rmsnorm")


def pulled_squares(q: Tensor, k: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i (q_i·k_j)² / Σ_j (q_i·k_j)² (T,), the mean over heads.

    (q·k)² is a product of outer products: q_iᵀ (Σ_j k_j k_jᵀ) q_i, and likewise for the sum over i.
    """
    with torch.no_grad():
        stored, _ = gather(k, k, cu_seqlens)
        own = (ask(q, stored, cu_seqlens) * q).sum(-1)
        share = torch.where(own > 0, weights.to(own.dtype)[:, None] / own, 0.0)
        asking, _ = gather(share[..., None].to(q.dtype) * q, q, cu_seqlens)
        found = (ask(k, asking, cu_seqlens) * k).sum(-1)
    return found.mean(1).to(weights.dtype)
