"""Attentive probing: learned queries pool the tiles' own features, without any projection.

e_m = u_m · x / √width                  (T, M), query m of M; over all channels or over its group
a_m = softmax of e_m over the bag
z_m = Σ a_m x                           of its group of channels, or of all
z = z_1 … z_M side by side,  logits = Linear(z)

Efficient probing (Psomas et al. 2025) scores over all channels and pools a group with each query.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import draw_seed, dropped, in_parts
from bagscope.mil.aggregators.query_scores import log_mean_weight
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec

Channels = Literal["all", "group"]
_STD = 0.02
_COLUMNS = 16
"""As many as the pooling's kernel takes at a time."""


class AttentiveProbeOptions(Spec):
    """Options of attentive probing."""

    queries: int = Field(default=16, ge=1, description="learned queries, each with its own softmax")
    scored: Channels = Field(
        default="all",
        description="channels that a query scores tiles by: all, or its group of them",
    )
    pooled: Channels = Field(
        default="group", description="channels that a query pools: its group, or all"
    )
    layer_norm: bool = Field(
        default=False, description="whether tiles are normalised first, without learned scales"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what is pooled")


@register(
    "attentive_probe",
    AttentiveProbeOptions,
    summary="learned queries pool the tiles' own features, without projections",
    reference="Psomas et al., Attention, Please! Revisiting Attentive Probing, 2025",
)
class AttentiveProbe(Aggregator):
    """A tile's score is the log of its mean weight over the queries."""

    def __init__(self, features: int, outputs: int, options: AttentiveProbeOptions) -> None:
        super().__init__()
        self.options = options
        self.features = features
        queries, self.group = options.queries, -(-features // options.queries)
        scored = features if options.scored == "all" else self.group
        pooled = queries * features if options.pooled == "all" else features
        self.queries = nn.Parameter(torch.empty(queries, scored).normal_(std=_STD))
        self.classifier = nn.Linear(pooled, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits."""
        x = self._tiles(bags)
        scores = self._scores(x)
        # Sixteen queries at a time.
        parts = [
            segment_softmax_pool(part.contiguous(), x, bags.cu_seqlens)
            for part in torch.split(scores, _COLUMNS, 1)
        ]
        z = torch.cat([part.pooled for part in parts], 1)
        z = z.flatten(1) if self.options.pooled == "all" else self._own(z)
        if self.training and self.options.dropout:
            z = dropped(z, self.options.dropout, draw_seed(bags))
        lse = torch.cat([part.lse for part in parts], 1)
        log_weights = scores - lse[bag_of_tile(bags.cu_seqlens, len(scores))]
        return BagOutput(
            logits=self.classifier(z),
            embedding=z,
            scores=log_mean_weight(log_weights),
            score_kind="log_weight",
            entropy=torch.cat([part.entropy for part in parts], 1),
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return every query's scores, and each tile's class logits at weight 1."""
        x, weight = self._tiles(bags), self.classifier.weight
        wide = x.to(weight.dtype)
        if self.options.pooled == "all":
            each = in_parts(weight, self.options.queries)
            values = torch.einsum("td,cmd->tmc", wide, each)
        else:
            values = torch.einsum("tmd,cmd->tmc", self._groups(wide), self._groups(weight))
        return PoolingTerms(scores=self._scores(x), values=values, bias=self.classifier.bias)

    def _tiles(self, bags: Bags) -> Tensor:
        x = bags.features
        if not self.options.layer_norm:
            return x
        return functional.layer_norm(x.to(computing_dtype(x)), x.shape[1:])

    def _scores(self, x: Tensor) -> Tensor:
        """Return the logits of attention (T, M) of tiles (T, D)."""
        queries = self.queries * self.queries.shape[1] ** -0.5
        if self.options.scored == "group":
            # A row per query that is zero but for its group: one product serves all.
            own = torch.eye(len(queries), dtype=queries.dtype, device=queries.device)
            queries = (own[:, :, None] * queries[:, None]).flatten(1)[:, : self.features]
        dtype = computing_dtype(x)
        return functional.linear(x.to(dtype), queries.to(dtype)).to(queries.dtype)

    def _groups(self, x: Tensor) -> Tensor:
        """Return channels (..., D) in groups (..., M, d); zeros fill the last ones up."""
        wide = functional.pad(x, (0, self.group * self.options.queries - self.features))
        return in_parts(wide, self.options.queries)

    def _own(self, pooled: Tensor) -> Tensor:
        """Return of all that the queries pooled (B, M, D) each one's group of channels: (B, D)."""
        own = self._groups(pooled).diagonal(dim1=1, dim2=2)
        return own.transpose(1, 2).flatten(1)[:, : self.features]
