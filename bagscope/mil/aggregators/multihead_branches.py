"""Branches of multi-head attention that ask one bag, each with a query of its own.

For branch m and head j, with q = Linear_q(query_m) and keys, values = Linear_k(h), Linear_v(h):
    e = q_j · keys_j / √d,  a = softmax of e over the bag,  z_m = LayerNorm(Linear_o(Σ a values))

A branch has one query, so its keys and values need never exist: e = (K_jᵀ q_j) · h + const, and
Σ a (V h + b) = V (Σ a h) + b. What is made of the tiles are M·H scores and M·H means of h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.mil.aggregators.branches import Branched, Mask
from bagscope.mil.aggregators.layers import Projection, draw_seed, dropped
from bagscope.mil.bags import Bags

_EPS = 1e-6
_QUERY_STD = 1e-6


class MultiHeadBranches(nn.Module):
    """M branches with H heads each, and the vector of their mean attention, taken head by head."""

    def __init__(
        self, projection: Projection, *, branches: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        hidden = projection.out_features
        self.projection = projection
        self.scores = HeadScores(hidden, branches, heads)
        self.each = HeadValues(hidden, branches, heads, dropout)
        self.together = HeadValues(hidden, 1, heads, dropout)
        self.shape = (branches, heads)

    def forward(self, bags: Bags, mask: Mask | None) -> Branched:
        """Return what the branches say."""
        h = self.projection(bags.features)
        scores = self.scores(h)
        if mask is not None:
            scores = mask(scores)
        scores = scores.view(len(h), *self.shape)
        # Branch by branch: the pooling's kernel takes up to 16 columns.
        found = [
            segment_softmax_pool(part.contiguous(), h, bags.cu_seqlens) for part in scores.unbind(1)
        ]
        pooled = torch.stack([part.pooled for part in found], 1)
        return Branched(
            each=self.each(pooled, bags, use=1),
            together=self.together(pooled.mean(1, keepdim=True), bags, use=2)[:, 0],
            scores=scores,
            lse=torch.stack([part.lse for part in found], 1),
            entropy=torch.cat([part.entropy for part in found], 1),
        )


class HeadValues(nn.Module):
    """From what the heads pooled to one vector for each of `branches`."""

    def __init__(self, hidden: int, branches: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.value = nn.Linear(hidden, branches * hidden)
        self.out = nn.Linear(hidden, branches * hidden)
        self.norm_weight = nn.Parameter(torch.ones(branches, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(branches, hidden))
        self.shape = (branches, heads, hidden // heads)
        self.dropout = dropout

    def forward(self, pooled: Tensor, bags: Bags, use: int) -> Tensor:
        """Return (B, branches, hidden) of pooled tiles (B, branches, heads, hidden)."""
        branches, heads, width = self.shape
        hidden = heads * width
        value = self.value.weight.view(branches, heads, width, hidden)
        z = torch.einsum("bmjd,mjwd->bmjw", pooled, value).flatten(2)
        z = z + self.value.bias.view(branches, hidden)
        z = torch.einsum("bmd,mod->bmo", z, self.out.weight.view(branches, hidden, hidden))
        z = z + self.out.bias.view(branches, hidden)
        if self.training:
            z = dropped(z.flatten(1), self.dropout, draw_seed(bags, use)).view_as(z)
        normed: Tensor = functional.layer_norm(z, (hidden,), eps=_EPS)
        return normed * self.norm_weight + self.norm_bias


class HeadScores(nn.Module):
    """The attention's logits of all branches and heads."""

    def __init__(self, hidden: int, branches: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(branches, hidden).normal_(std=_QUERY_STD))
        self.ask = nn.Linear(hidden, branches * hidden)
        self.key = nn.Linear(hidden, branches * hidden)
        self.shape = (branches, heads, hidden // heads)

    def forward(self, h: Tensor) -> Tensor:
        """Return (T, branches · heads) of projected tiles (T, hidden), in full precision."""
        branches, heads, width = self.shape
        hidden = heads * width
        asked = torch.einsum("md,mod->mo", self.query, self.ask.weight.view(branches, -1, hidden))
        asked = (asked + self.ask.bias.view(branches, hidden)).view(self.shape) * width**-0.5
        key = self.key.weight.view(branches, heads, width, hidden)
        weight = torch.einsum("mjw,mjwd->mjd", asked, key).flatten(0, 1)
        bias = (asked * self.key.bias.view(self.shape)).sum(-1).flatten()
        scores: Tensor = functional.linear(h, weight.to(h.dtype)).to(weight.dtype) + bias
        return scores
