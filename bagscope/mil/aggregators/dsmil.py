"""DSMIL (Li et al. 2021): per class, a critical tile, and attention by likeness to it.

c_i = W x_i + b                          (T, C), the tile m_c with the highest c_ic is critical
max stream:  logits_c = c_{m_c}          one tile per class
q = tanh(V₂ relu(V₁ x)), or V₁ x;  v = x, or relu(V₃ dropout(x))
a_ic = softmax over the bag of q_i · q_{m_c} / √width
bag stream:  logits = Linear([Σ a_i1 v_i, …, Σ a_iC v_i])

Equal tiles: the first one is critical. The choice has no gradient, the chosen tile has.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bagscope.kernels.linear_attention.halves import ask
from bagscope.kernels.segment_softmax_pool import accumulator, segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import Activation, Projection, draw_seed, dropped, linear
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec


class DSMILOptions(Spec):
    """Options of DSMIL."""

    hidden: int | None = Field(
        default=None, ge=1, description="width of a projection before all else; none if not set"
    )
    activation: Activation | None = Field(
        default=None, description="of that projection: relu (if not set) or gelu"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="of the projected tile; 0 if not set"
    )
    query: int = Field(default=128, ge=1, description="width of the queries")
    q: Literal["nonlinear", "linear"] = Field(
        default="nonlinear", description="how queries are made: two layers (nonlinear) or linear"
    )
    v: Literal["identity", "passing"] = Field(
        default="identity", description="what is pooled: tiles, or tiles behind a layer (passing)"
    )
    value_dropout: float | None = Field(
        default=None, ge=0, lt=1, description="passing: of the tiles before that layer; 0 if unset"
    )
    predict: Literal["bag", "mean"] = Field(
        default="bag", description="from the bag stream, or the mean of both streams' logits"
    )

    @model_validator(mode="after")
    def _used(self) -> DSMILOptions:
        if self.hidden is None and (self.activation is not None or self.dropout is not None):
            raise ValueError("activation and dropout belong to a projection; set hidden")
        if self.v == "identity" and self.value_dropout is not None:
            raise ValueError("value_dropout belongs to v: passing, and v is identity")
        return self


@register(
    "dsmil",
    DSMILOptions,
    summary="a critical tile per class, and attention by likeness to it",
    reference="Li et al., Dual-stream Multiple Instance Learning Network, CVPR 2021",
)
class DSMIL(Aggregator):
    """Two streams: the best tile of each class, and what is like it."""

    def __init__(self, features: int, outputs: int, options: DSMILOptions) -> None:
        super().__init__()
        self.options = options
        self.projection: Projection | None = None
        if options.hidden is not None:
            activation, dropout = options.activation or "relu", options.dropout or 0.0
            self.projection = Projection(
                features, options.hidden, activation=activation, dropout=dropout
            )
            features = options.hidden
        self.instance = nn.Linear(features, outputs)
        self.query = nn.Linear(features, options.query)
        is_deep, passes = options.q == "nonlinear", options.v == "passing"
        self.query_out = nn.Linear(options.query, options.query) if is_deep else None
        self.value = nn.Linear(features, features) if passes else None
        self.classifier = nn.Linear(outputs * features, outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, bags: Bags) -> BagOutput:
        """Return both streams' logits, the max stream's as a branch; scores are a per class."""
        x = self._tiles(bags)
        critical = self._critical(x, bags.cu_seqlens)
        highest = (critical * self.instance.weight).sum(2) + self.instance.bias
        scores = self._scores(x, critical, bags.cu_seqlens)
        found = segment_softmax_pool(scores, self._values(x, bags), bags.cu_seqlens)
        embedding = found.pooled.flatten(1)
        logits = self.classifier(embedding)
        if self.options.predict == "mean" and not self.training:
            logits = (logits + highest) / 2
        return BagOutput(
            logits=logits,
            embedding=embedding,
            scores=scores,
            score_kind="log_weight",
            branch_logits=highest[:, None],
            entropy=found.entropy,
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return each class's scores and what a tile adds through each class's mean.

        They hold beside the bag's critical tiles. None where the max stream is in the logits.
        """
        if self.options.predict == "mean":
            return None
        x = self._tiles(bags)
        weight = self.classifier.weight
        outputs, width = len(weight), x.shape[1]
        values = self._values(x, bags).to(weight.dtype)
        return PoolingTerms(
            scores=self._scores(x, self._critical(x, bags.cu_seqlens), bags.cu_seqlens),
            values=torch.einsum("td,okd->tko", values, weight.view(outputs, outputs, width)),
            bias=self.classifier.bias,
        )

    def _tiles(self, bags: Bags) -> Tensor:
        if self.projection is None:
            return bags.features
        h: Tensor = self.projection(bags.features, draw_seed(bags) if self.training else 0)
        return h

    def _critical(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return each class's critical tile (B, C, D) in full precision, 0 for an empty bag."""
        with torch.no_grad():
            # In full precision: rounded logits tie, and a tie decides which tile is critical.
            tiles = x.to(self.instance.weight.dtype)
            rows = segment_argmax(self.instance(tiles), cu_seqlens)
        is_empty = (cu_seqlens.diff() == 0)[:, None, None]
        return x[rows].to(self.instance.weight.dtype).masked_fill(is_empty, 0.0)

    def _queries(self, x: Tensor) -> Tensor:
        q = linear(x, self.query)
        if self.query_out is not None:
            q = linear(q.relu(), self.query_out).tanh()
        return q.to(accumulator(q.dtype))

    def _scores(self, x: Tensor, critical: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return how alike every tile is to each class's critical one: (T, C)."""
        wanted = self._queries(critical) * self.options.query**-0.5
        q = self._queries(x)
        return ask(q[:, None], wanted.mT[:, None].contiguous(), cu_seqlens)[:, 0]

    def _values(self, x: Tensor, bags: Bags) -> Tensor:
        if self.value is None:
            return x
        if self.training:
            x = dropped(x, self.options.value_dropout or 0.0, draw_seed(bags, use=1))
        return linear(x, self.value).relu()


def segment_argmax(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the row (B, C) of the highest of values (T, C) in each bag, the first of equal ones.

    Of an empty bag it is any row.
    """
    tiles, columns = values.shape
    bags = bag_of_tile(cu_seqlens, tiles)
    top = values.new_full((len(cu_seqlens) - 1, columns), float("-inf"))
    top = top.scatter_reduce(0, bags[:, None].expand_as(values), values, "amax")
    row = torch.arange(tiles, device=values.device)[:, None]
    rows = torch.where(values == top[bags], row, tiles - 1)
    first = torch.full(top.shape, tiles - 1, device=values.device)
    return first.scatter_reduce(0, bags[:, None].expand_as(rows), rows, "amin")
