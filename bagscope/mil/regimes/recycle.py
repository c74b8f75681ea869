"""The global recycle network of MHIM v2: what a student is not shown comes back as a few tokens.

Of a bag's n embedded tiles a random ⌊n · keep⌋ stay as they are; the rest is asked by k queries G:

    r = dropout(Linear(Σ_t dropout(a_t) V x̂_t)),   a = softmax over the rest of Q ĝ · K x̂_t / √d

with heads, x̂ = LN x, ĝ = LN g by the same LN, and Q, K, V without biases. The k tokens r come after
the tiles that stayed. G is not learnt: after a step it moves to G ← m G + (1 − m) · mean of r over
the bags of the step, so that neither packing nor cutting a step into batches changes it. With one
bag in a step that is the published rule.

Shapes: t tiles of B bags that stayed, w features; the result has t + B · k rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.linear_attention.halves import gather
from bagscope.kernels.segments import bag_of_tile, borders_of
from bagscope.mil.aggregators.layers import draw_seed, dropped, linear
from bagscope.mil.bags import Bags
from bagscope.mil.regimes.masks import ranked
from bagscope.specs import Spec

_INIT = 768
"""The reference draws G from ±√(6 / (768 + w)), as a visual prompt for patches of 3 · 16²."""


class RecycleSpec(Spec):
    """The global recycle network."""

    queries: int = Field(default=10, ge=1, description="recycled tokens of a bag")
    keep: float = Field(
        default=0.9, ge=0, lt=1, description="share of the unmasked tiles that stay tiles"
    )
    heads: int = Field(default=8, ge=1, description="heads of the attention")
    head: int = Field(default=64, ge=1, description="width of a head")
    momentum: float = Field(default=0.9999, ge=0, le=1, description="of the queries' running mean")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="of the attention and of the recycled tokens"
    )


class Recycle(nn.Module):
    """Attention from global queries to the tiles that are taken away."""

    query: Tensor

    def __init__(self, width: int, spec: RecycleSpec) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.heads * spec.head
        self.norm = nn.LayerNorm(width)
        self.ask = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width)
        bound = math.sqrt(6 / (_INIT + width))
        self.register_buffer("query", torch.empty(spec.queries, width).uniform_(-bound, bound))
        self._recycled: list[Tensor] = []

    def forward(self, bags: Bags, numbers: Tensor) -> Bags:
        """Return the tiles that stay and, after those of their bag, the recycled tokens.

        Recycled tokens have no place, so places are left out.

        Args:
            bags: embedded tiles (T, w).
            numbers: (T,) random ones; the tiles of a bag with the lowest stay.
        """
        x, borders = bags.features, bags.cu_seqlens
        count = len(bags)
        bag = bag_of_tile(borders, len(x))
        # In float64, as the original rounds: ⌊35 · 0.8⌋ is 28.
        kept = (borders.diff().double() * self.spec.keep).floor().to(borders.dtype)
        stays = ranked(numbers, borders) < kept[bag]
        rest = borders_of(borders.diff() - kept)
        recycled = self._asked(x[~stays], rest, bags)
        if self.training:
            self._recycled.append(recycled.detach())
        tokens = torch.cat([x[stays], recycled.flatten(0, 1).to(x.dtype)])
        whose = torch.arange(count, device=x.device).repeat_interleave(self.spec.queries)
        order = torch.cat([bag[stays], whose]).argsort(stable=True)
        return replace(
            bags,
            features=tokens[order],
            cu_seqlens=borders_of(kept + self.spec.queries),
            coords_l0=None,
            grid=None,
            parent=None,
            tile_slide=None,
            tile_row=None,
        )

    def after_step(self) -> None:
        """Let the queries follow what a step's bags gave."""
        if self._recycled:
            mean = torch.cat(self._recycled).mean(0)
            self.query.lerp_(mean.to(self.query.dtype), 1 - self.spec.momentum)
            self._recycled.clear()

    def _asked(self, x: Tensor, borders: Tensor, bags: Bags) -> Tensor:
        """Return the recycled tokens (B, k, w) of the tiles (T, w) that were taken away."""
        spec = self.spec
        normed = self.norm(x.to(self.norm.weight.dtype)).to(x.dtype)
        q = self.ask(self.norm(self.query)).view(spec.queries, spec.heads, spec.head)
        k, v = linear(normed, self.key_value).view(len(x), 2, spec.heads, spec.head).unbind(1)
        k, v = k.contiguous(), v.contiguous()
        drops = self.training and spec.dropout > 0
        pooled, _, weights = cross_attention_pool(q, k, v, borders, return_weights=drops)
        if weights is not None:
            # Dropped after the softmax, so what is left need not add up to one.
            columns = spec.queries * spec.heads
            left = dropped(weights.reshape(-1, columns), spec.dropout, draw_seed(bags, use=5))
            left = left.view_as(weights).transpose(1, 2).contiguous()
            pooled = gather(left, v.to(left.dtype), borders)[0].transpose(1, 2)
        recycled: Tensor = self.out(pooled.flatten(2).to(self.out.weight.dtype))
        if not drops:
            return recycled
        rows = recycled.flatten(0, 1)
        return dropped(rows, spec.dropout, draw_seed(bags, use=6)).view_as(recycled)
