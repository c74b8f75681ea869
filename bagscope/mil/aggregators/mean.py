"""Mean pooling: a two-layer network on every tile, and the mean over the bag.

h = dropout(act(W x + b)),  z = mean of h,  logits = V z + c, which is the mean of the tiles' logits
"""

from __future__ import annotations

import torch
from torch.nn import functional

from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.tile_network import TileNetwork, TileNetworkOptions
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms


@register(
    "mean",
    TileNetworkOptions,
    summary="mean of the tiles' logits",
    reference="the usual baseline, as in Ilse et al., ICML 2018",
)
class MeanPooling(Aggregator):
    """The mean over the bag: attention pooling in which every tile weighs the same."""

    def __init__(self, features: int, outputs: int, options: TileNetworkOptions) -> None:
        super().__init__()
        self.network = TileNetwork(features, outputs, options)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are the tiles' own logits."""
        h = self.network.project(bags)
        equal = h.new_zeros(len(h), 1, dtype=torch.promote_types(h.dtype, torch.float32))
        embedding = segment_softmax_pool(equal, h, bags.cu_seqlens).pooled[:, 0]
        return BagOutput(
            logits=self.network.pooled_logits(embedding, bags),
            embedding=embedding,
            scores=self.network.tile_logits(h),
            score_kind="instance_logit",
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return equal scores and each tile's logits."""
        weight, bias = self.network.classifier.weight, self.network.classifier.bias
        h = self.network.projection(bags.features.to(weight.dtype))
        values = functional.linear(h, weight)[:, None]
        return PoolingTerms(scores=values.new_zeros(len(h), 1), values=values, bias=bias)
