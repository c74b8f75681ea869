"""Max pooling: a two-layer network on every tile, and the maximum over the bag.

instance level:   logits_c = max_i (V h_i + b)_c        each class for itself
embedding level:  z_d = max_i h_id,  logits = V z + b   each hidden unit for itself
"""

from __future__ import annotations

from torch import Tensor

from bagscope.kernels.segment_softmax_pool import accumulator
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.tile_network import TileNetwork, TileNetworkOptions
from bagscope.mil.bags import BagOutput, Bags


@register(
    "max",
    TileNetworkOptions,
    summary="maximum of the tiles' logits, class by class",
    reference="the usual baseline, as in Ilse et al., ICML 2018",
)
class MaxPooling(Aggregator):
    """The maximum over the bag: a logit is that of one tile."""

    def __init__(self, features: int, outputs: int, options: TileNetworkOptions) -> None:
        super().__init__()
        self.network = TileNetwork(features, outputs, options)
        self.level = options.level

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are the tiles' own logits, at either level."""
        h = self.network.project(bags)
        scores = self.network.tile_logits(h)
        if self.level == "instance":
            logits = embedding = segment_max(scores, bags.cu_seqlens)
        else:
            embedding = segment_max(h, bags.cu_seqlens).to(accumulator(h.dtype))
            logits = self.network.pooled_logits(embedding, bags)
        return BagOutput(
            logits=logits, embedding=embedding, scores=scores, score_kind="instance_logit"
        )


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the maximum (B, C) of values (T, C) over each bag, 0 for an empty bag.

    Equal tiles at the top share the gradient, so that their order does not matter.
    """
    bags = bag_of_tile(cu_seqlens, len(values))[:, None].expand_as(values)
    top = values.new_full((len(cu_seqlens) - 1, values.shape[1]), float("-inf"))
    top = top.scatter_reduce(0, bags, values, "amax")
    return top.masked_fill((cu_seqlens.diff() == 0)[:, None], 0.0)
