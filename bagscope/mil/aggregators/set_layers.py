"""The layers of Set Transformer (Lee et al. 2019), on bags end to end.

MAB(Q, K):  O = Q W_q + softmax(Q W_q (K W_k)ᵀ / √width) K W_v     heads share the width
            O ← LN O,  O ← O + relu(O W_o),  O ← LN O              LN only where asked for
ISAB(X) = MAB(X, MAB(I, X)),  SAB(X) = MAB(X, X),  PMA(X) = MAB(S, X)

Scores are divided by the root of the whole width, not of a head's, as the authors do. I and S are
learned rows. Tiles and bags are T and B; a result is in the parameters' dtype, products in x's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.linear_attention.agent import ask_agents
from bagscope.kernels.varlen_self_attention import varlen_self_attention
from bagscope.mil.aggregators.layers import in_parts, linear
from bagscope.mil.aggregators.query_scores import log_weights, query_scores
from bagscope.mil.aggregators.rolling import (
    pulled_through,
    pulled_through_softmax,
    pulled_to_tiles,
)


class MAB(nn.Module):
    """Multi-head attention from rows to rows; which are tiles, the method says."""

    def __init__(
        self, queries: int, keys: int, width: int, heads: int, *, is_normed: bool = False
    ) -> None:
        super().__init__()
        self.fc_q = nn.Linear(queries, width)
        self.fc_k = nn.Linear(keys, width)
        self.fc_v = nn.Linear(keys, width)
        self.fc_o = nn.Linear(width, width)
        self.ln0 = nn.LayerNorm(width) if is_normed else None
        self.ln1 = nn.LayerNorm(width) if is_normed else None
        self.heads = heads
        self.scale = width**-0.5

    def gather(self, queries: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what rows (m, Dq) learn of each bag's tiles (T, Dk): (B, m, width)."""
        q, k, v = linear(queries, self.fc_q), linear(x, self.fc_k), linear(x, self.fc_v)
        pooled, _, _ = cross_attention_pool(
            self._split(q), self._split(k), self._split(v), cu_seqlens, scale=self.scale
        )
        return self._finish(q, pooled)

    def gather_scored(
        self, queries: Tensor, x: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `gather` of rows (m, Dq), and log weights (T, m, heads) of the tiles."""
        q, k, v = linear(queries, self.fc_q), linear(x, self.fc_k), linear(x, self.fc_v)
        heads_q, heads_k = self._split(q), self._split(k)
        pooled, lse, _ = cross_attention_pool(
            heads_q, heads_k, self._split(v), cu_seqlens, scale=self.scale
        )
        scores = query_scores(heads_q, heads_k, self.scale)
        return self._finish(q, pooled), log_weights(scores, lse, cu_seqlens)

    def tell(self, x: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what tiles (T, Dq) learn of their bag's rows (B, m, Dk): (T, width)."""
        q, k, v = linear(x, self.fc_q), linear(rows, self.fc_k), linear(rows, self.fc_v)
        found = ask_agents(
            self._split(q), self._split(k), self._split(v), cu_seqlens, scale=self.scale
        )
        return self._finish(q, found)

    def pulled_to_rows(
        self, x: Tensor, rows: Tensor, cu_seqlens: Tensor, weights: Tensor
    ) -> Tensor:
        """Return what tiles' weights (T,) become on the rows that `tell` reads: (B, m)."""
        q, k = self._split(linear(x, self.fc_q)), self._split(linear(rows, self.fc_k))
        return pulled_through(
            lambda values: ask_agents(q, k, values, cu_seqlens, scale=self.scale), weights, k
        )

    def pulled_between(self, x: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
        """Return what tiles' weights (T,) become on the tiles that `between_tiles` reads: (T,)."""
        q, k = self._split(linear(x, self.fc_q)), self._split(linear(x, self.fc_k))
        return pulled_through_softmax(q, k, weights, cu_seqlens, scale=self.scale)

    def between_tiles(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what tiles (T, D) learn of all tiles of their bag: (T, width)."""
        q, k, v = linear(x, self.fc_q), linear(x, self.fc_k), linear(x, self.fc_v)
        found = varlen_self_attention(
            self._split(q), self._split(k), self._split(v), cu_seqlens, scale=self.scale
        )
        return self._finish(q, found)

    def between_rows(self, rows: Tensor) -> Tensor:
        """Return what few rows (B, m, D) learn of each other: (B, m, width)."""
        q, k, v = (layer(rows) for layer in (self.fc_q, self.fc_k, self.fc_v))
        heads_q, heads_k, heads_v = self._split(q), self._split(k), self._split(v)
        scores = self.scale * torch.einsum("bmhd,bnhd->bhmn", heads_q, heads_k)
        found = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), heads_v)
        return self._finish(q, found)

    def _split(self, x: Tensor) -> Tensor:
        return in_parts(x, self.heads)

    def _finish(self, q: Tensor, found: Tensor) -> Tensor:
        dtype = self.fc_o.weight.dtype
        o: Tensor = q.to(dtype) + found.flatten(-2).to(dtype)
        if self.ln0 is not None:
            o = self.ln0(o)
        o = o + functional.relu(linear(o.to(q.dtype), self.fc_o)).to(dtype)
        return o if self.ln1 is None else self.ln1(o)


class ISAB(nn.Module):
    """Tiles learn of each other through m inducing rows: O(T m)."""

    def __init__(
        self, features: int, width: int, heads: int, inducing: int, *, is_normed: bool = False
    ) -> None:
        super().__init__()
        self.inducing = learned_rows(inducing, width)
        self.mab0 = MAB(width, features, width, heads, is_normed=is_normed)
        self.mab1 = MAB(features, width, width, heads, is_normed=is_normed)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return (T, width) of tiles (T, features)."""
        rows = self.mab0.gather(self.inducing, x, cu_seqlens)
        return self.mab1.tell(x, rows, cu_seqlens)

    def pulled(self, x: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
        """Return weights (T,) of what tiles learn as those of whom they learn it; see `rolling`."""
        rows, asked = self.mab0.gather_scored(self.inducing, x, cu_seqlens)
        on_rows = self.mab1.pulled_to_rows(x, rows.to(x.dtype), cu_seqlens, weights)
        return pulled_to_tiles(on_rows, asked.exp(), cu_seqlens)


class SAB(nn.Module):
    """Tiles learn of each other directly: O(N²) operations, O(N) memory."""

    def __init__(self, features: int, width: int, heads: int, *, is_normed: bool = False) -> None:
        super().__init__()
        self.mab = MAB(features, features, width, heads, is_normed=is_normed)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return (T, width) of tiles (T, features)."""
        return self.mab.between_tiles(x, cu_seqlens)

    def pulled(self, x: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
        """Return weights (T,) of what tiles learn as those of whom they learn it; see `rolling`."""
        return self.mab.pulled_between(x, cu_seqlens, weights)


class PMA(nn.Module):
    """Pooling by the attention of k learned seeds."""

    def __init__(self, width: int, heads: int, seeds: int, *, is_normed: bool = False) -> None:
        super().__init__()
        self.seeds = learned_rows(seeds, width)
        self.mab = MAB(width, width, width, heads, is_normed=is_normed)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, seeds, width) of tiles (T, width), and log weights (T, seeds, heads)."""
        return self.mab.gather_scored(self.seeds, x, cu_seqlens)


def learned_rows(count: int, width: int) -> nn.Parameter:
    """Return rows (count, width), drawn by Xavier's rule for (1, count, width) as there."""
    bound = math.sqrt(6 / (width * (count + 1)))
    return nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
