"""Hopfield pooling (Ramsauer et al. 2021): learned states retrieve what a bag has stored.

q = W_q LN(s),  k = W_k LN(x),  v = W_v LN(x)      a layer norm each; (m, heads · hidden), (T, ...)
ξ = softmax of β q · k over the bag                per state and head
q ← Σ ξ k, up to `update_steps` times              until no head's ξ changes by more than update_eps
z = W_o Σ ξ v                                      (B, m, D),  logits = Linear(z)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.cross_attention_pool import cross_attention_pool, retrieve
from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import draw_seed, dropped, in_parts
from bagscope.mil.aggregators.query_scores import log_mean_weight, log_weights, query_scores
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec

_STD = 0.02


class HopfieldOptions(Spec):
    """Options of Hopfield pooling."""

    hidden: int = Field(default=32, ge=1, description="width of a head, in which is associated")
    heads: int = Field(default=1, ge=1, description="heads, each with its own association")
    states: int = Field(
        default=1, ge=1, description="learned state patterns; they lie side by side"
    )
    beta: float | None = Field(
        default=None, gt=0, description="sharpness of the association; 1 / √hidden if not set"
    )
    update_steps: int = Field(
        default=0, ge=0, description="how often at most a state moves to what it retrieves"
    )
    update_eps: float = Field(
        default=1e-4, ge=0, description="change of a head's association that ends its updates"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of the association")


class Association(NamedTuple):
    """Values (T, H, d), scores and log weights (T, m, H), pooled values (B, m, H, d)."""

    values: Tensor
    scores: Tensor
    log_weights: Tensor
    pooled: Tensor


@register(
    "hopfield",
    HopfieldOptions,
    summary="learned states associate with the tiles, once or until they rest",
    reference="Ramsauer et al., Hopfield Networks is All You Need, ICLR 2021",
)
class Hopfield(Aggregator):
    """A tile's score is the log of its mean association over states and heads."""

    def __init__(self, features: int, outputs: int, options: HopfieldOptions) -> None:
        super().__init__()
        self.options = options
        width = options.heads * options.hidden
        self.states = nn.Parameter(torch.empty(options.states, features).normal_(std=_STD))
        self.norm_state = nn.LayerNorm(features)
        self.norm_key = nn.LayerNorm(features)
        self.norm_value = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * width)
        self.out = nn.Linear(width, features)
        self.classifier = nn.Linear(options.states * features, outputs)
        nn.init.normal_(self.qkv.weight, std=_STD)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits."""
        found = self._associate(bags)
        pooled = found.pooled
        if self.training and self.options.dropout:
            pooled = self._dropped(found, bags)
        embedding = functional.linear(
            pooled.to(self.out.weight.dtype).flatten(2), self.out.weight, self.out.bias
        ).flatten(1)
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=log_mean_weight(found.log_weights),
            score_kind="log_weight",
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return the scores of every state and head, and each tile's class logits at weight 1.

        With updates, a tile's scores depend on the tiles beside it.
        """
        found = self._associate(bags)
        classes = in_parts(self.classifier.weight, self.options.states)
        heads = in_parts(self.out.weight, self.options.heads)
        weight = torch.einsum("cmf,fhd->mhcd", classes, heads)
        values = torch.einsum("thd,mhcd->tmhc", found.values.to(weight.dtype), weight)
        return PoolingTerms(
            scores=found.scores.flatten(1),
            values=values.flatten(1, 2),
            bias=self.classifier(self.out.bias.repeat(self.options.states)),
        )

    def _associate(self, bags: Bags) -> Association:
        options, borders = self.options, bags.cu_seqlens
        beta = options.hidden**-0.5 if options.beta is None else options.beta
        q_weight, k_weight, v_weight = self.qkv.weight.chunk(3)
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)
        q = functional.linear(self.norm_state(self.states), q_weight, q_bias)
        # Both norms of a tile differ in their scale and shift alone, which go into the products.
        weight = torch.cat([k_weight * self.norm_key.weight, v_weight * self.norm_value.weight])
        # What all keys share changes no softmax over tiles: it counts where states move to keys.
        shared = k_weight @ self.norm_key.bias + k_bias
        shared = shared if options.update_steps else 0.0 * shared
        bias = torch.cat([shared, v_weight @ self.norm_value.bias + v_bias])
        x = bags.features.to(computing_dtype(bags.features))
        x = functional.layer_norm(x, x.shape[1:], eps=self.norm_key.eps)
        kv = functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        k, v = (in_parts(half, options.heads) for half in kv.chunk(2, 1))
        q = in_parts(q, options.heads)
        bag = None
        if options.update_steps:
            q = retrieve(
                q, k, borders, scale=beta, steps=options.update_steps, eps=options.update_eps
            )
            bag = bag_of_tile(borders, len(k))
        pooled, lse, _ = cross_attention_pool(q, k, v, borders, scale=beta)
        scores = query_scores(q, k, beta, bag)
        return Association(v, scores, log_weights(scores, lse, borders), pooled)

    def _dropped(self, found: Association, bags: Bags) -> Tensor:
        """Return what is pooled (B, m, H, d) after dropout of the association."""
        weights = found.log_weights.exp()
        weights = dropped(weights.flatten(1), self.options.dropout, draw_seed(bags)).view_as(
            weights
        )
        shares = weights[..., None] * found.values[:, None]
        pooled = torch.zeros_like(found.pooled, dtype=shares.dtype)
        return pooled.index_add(0, bag_of_tile(bags.cu_seqlens, len(shares)), shares)
