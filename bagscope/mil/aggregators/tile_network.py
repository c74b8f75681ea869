"""Two layers on every tile, for the aggregators that pool without attention.

h = dropout(act(W x + b))  (T, hidden),  o = V h + c  (T, outputs)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from bagscope.kernels.segment_softmax_pool import accumulator
from bagscope.mil.aggregators.layers import (
    Activation,
    Init,
    Projection,
    draw_seed,
    dropped,
    linear,
    xavier,
)
from bagscope.mil.bags import Bags
from bagscope.specs import Spec


class TileNetworkOptions(Spec):
    """Options of mean and max pooling."""

    level: Literal["instance", "embedding"] = Field(
        default="instance", description="what is pooled: the tiles' logits, or their embeddings"
    )
    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    activation: Activation = Field(default="relu", description="of the projection: relu or gelu")
    dropout: float = Field(default=0.25, ge=0, lt=1, description="of what the classifier sees")
    init: Init = Field(default="xavier", description="initial weights: torch or xavier")


class TileNetwork(nn.Module):
    """The two layers.

    Dropout acts on what the classifier sees: on the tiles, or on the pooled embedding.
    """

    def __init__(self, features: int, outputs: int, options: TileNetworkOptions) -> None:
        super().__init__()
        is_of_tiles = options.level == "instance"
        self.projection = Projection(
            features,
            options.hidden,
            activation=options.activation,
            dropout=options.dropout if is_of_tiles else 0.0,
        )
        self.classifier = nn.Linear(options.hidden, outputs)
        self.pooled_dropout = 0.0 if is_of_tiles else options.dropout
        if options.init == "xavier":
            xavier(self)

    def project(self, bags: Bags) -> Tensor:
        """Return h (T, hidden)."""
        h: Tensor = self.projection(bags.features, draw_seed(bags))
        return h

    def tile_logits(self, h: Tensor) -> Tensor:
        """Return the logits (T, outputs) of each tile by itself, in full precision."""
        return linear(h, self.classifier).to(accumulator(h.dtype))

    def pooled_logits(self, embedding: Tensor, bags: Bags) -> Tensor:
        """Return the logits (B, outputs) of pooled embeddings (B, hidden)."""
        if self.training:
            embedding = dropped(embedding, self.pooled_dropout, draw_seed(bags, use=1))
        logits: Tensor = self.classifier(embedding)
        return logits
