"""The blocks of ILRA (Xiang & Zhang 2023), on bags end to end.

ATT(Q, K):  Q' = Q W_q,  A = multi-head attention from Q' to K W_k and K W_v
            O ← Q' + A,  O ← LN O,  O ← O + relu(O W_o),  O ← LN O      LN only where asked for
            O ← O · silu(Q W_g)                                         where gated
GAB(X) = ATT(X, ATT(L, X)), gated, with r learned rows L;  pooling: ATT(S, X) with learned rows S

The multi-head attention has projections of its own, behind W_q, W_k and W_v. Where few rows ask
tiles, the tiles' keys and values are never made: e = (K_jᵀ q_j) · x + const and
Σ a (V x + b) = V (Σ a x) + b. Where tiles ask a single row, all of them get its value.
T tiles, B bags, m rows, H heads, d features per head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.linear_attention.agent import ask_agents
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.rolling import pulled_through, pulled_to_tiles
from bagscope.mil.aggregators.set_layers import learned_rows

_COLUMNS = 16
"""As many as the pooling's kernel takes at a time."""


class Gathered(NamedTuple):
    """What rows learned: rows (B, m, width); and log weights of the tiles (T, m · H)."""

    rows: Tensor
    log_weights: Tensor


class GatedAttentionBlock(nn.Module):
    """ATT, between rows and the tiles of their bag, in either direction."""

    def __init__(
        self, queries: int, keys: int, width: int, heads: int, *, is_gated: bool, is_normed: bool
    ) -> None:
        super().__init__()
        self.query = nn.Linear(queries, width)
        self.key = nn.Linear(keys, width)
        self.value = nn.Linear(keys, width)
        self.inner = nn.Linear(width, 3 * width)
        self.inner_out = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.gate = nn.Linear(queries, width) if is_gated else None
        self.norm_first = nn.LayerNorm(width) if is_normed else None
        self.norm_last = nn.LayerNorm(width) if is_normed else None
        self.heads = heads
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
        # Torch's own start of multi-head attention, which the authors leave.
        nn.init.xavier_uniform_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.inner_out.bias)

    def gather(self, asking: Tensor, x: Tensor, cu_seqlens: Tensor) -> Gathered:
        """Return what learned rows (m, Dq) learn of each bag's tiles x (T, Dk)."""
        q = self.query(asking)
        (weight_q, weight_k, weight_v), (bias_q, bias_k, bias_v) = self._inner()
        rows, width = q.shape
        heads = (self.heads, width // self.heads)
        asked = functional.linear(q, weight_q, bias_q).view(rows, *heads) * heads[1] ** -0.5
        folded = torch.einsum("mhd,hdw->mhw", asked, weight_k.view(*heads, width))
        bias = folded @ self.key.bias + (asked * bias_k.view(heads)).sum(-1)
        keys = (folded @ self.key.weight).flatten(0, 1)
        scores = functional.linear(x, keys, bias.flatten())
        parts = [
            segment_softmax_pool(part.contiguous(), x, cu_seqlens)
            for part in torch.split(scores, _COLUMNS, 1)
        ]
        pooled = torch.cat([part.pooled for part in parts], 1)
        lse = torch.cat([part.lse for part in parts], 1)
        values = self.value(pooled).view(len(pooled), rows, self.heads, width)
        told = torch.einsum("bmhw,hdw->bmhd", values, weight_v.view(*heads, width)).flatten(2)
        found = self._finish(q, self.inner_out(told + bias_v), asking)
        return Gathered(found, scores - lse[bag_of_tile(cu_seqlens, len(x))])

    def tell(self, x: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what tiles (T, Dq) learn of the rows (B, m, Dk) of their bag: (T, width)."""
        q = self.query(x)
        (weight_q, weight_k, weight_v), (bias_q, bias_k, bias_v) = self._inner()
        told = functional.linear(self.value(rows), weight_v, bias_v)
        if rows.shape[1] == 1:
            bag = bag_of_tile(cu_seqlens, len(x))
            return self._finish(q, self.inner_out(told)[:, 0][bag], x)
        keys = functional.linear(self.key(rows), weight_k, bias_k)
        asked = functional.linear(q, weight_q, bias_q)
        found = ask_agents(self._split(asked), self._split(keys), self._split(told), cu_seqlens)
        return self._finish(q, self.inner_out(found.flatten(1)), x)

    def pulled_to_rows(
        self, x: Tensor, rows: Tensor, cu_seqlens: Tensor, weights: Tensor
    ) -> Tensor:
        """Return what tiles' weights (T,) become on the rows that `tell` reads: (B, m)."""
        (weight_q, weight_k, _), (bias_q, bias_k, _) = self._inner()
        keys = self._split(functional.linear(self.key(rows), weight_k, bias_k))
        asked = self._split(functional.linear(self.query(x), weight_q, bias_q))
        return pulled_through(
            lambda values: ask_agents(asked, keys, values, cu_seqlens), weights, keys
        )

    def _inner(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return weights and biases of the multi-head attention's q, k and v."""
        return self.inner.weight.chunk(3), self.inner.bias.chunk(3)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)

    def _finish(self, q: Tensor, found: Tensor, asking: Tensor) -> Tensor:
        o = q + found
        if self.norm_first is not None:
            o = self.norm_first(o)
        o = o + functional.relu(self.out(o))
        if self.norm_last is not None:
            o = self.norm_last(o)
        if self.gate is None:
            return o
        return o * functional.silu(self.gate(asking))


class GAB(nn.Module):
    """Tiles learn of each other through r learned rows: O(T r)."""

    def __init__(
        self, features: int, width: int, heads: int, rows: int, *, is_normed: bool
    ) -> None:
        super().__init__()
        self.latent = learned_rows(rows, width)
        self.forth = GatedAttentionBlock(
            width, features, width, heads, is_gated=True, is_normed=is_normed
        )
        self.back = GatedAttentionBlock(
            features, width, width, heads, is_gated=True, is_normed=is_normed
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return (T, width) of tiles (T, features)."""
        rows = self.forth.gather(self.latent, x, cu_seqlens).rows
        return self.back.tell(x, rows, cu_seqlens)

    def pulled(self, x: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
        """Return weights (T,) of what tiles learn as those of whom they learn it; see `rolling`."""
        rows, log_weights = self.forth.gather(self.latent, x, cu_seqlens)
        on_rows = self.back.pulled_to_rows(x, rows, cu_seqlens, weights)
        asked = log_weights.exp().view(len(x), len(self.latent), -1)
        return pulled_to_tiles(on_rows, asked, cu_seqlens)
