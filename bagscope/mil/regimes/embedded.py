"""An aggregator behind an embedding layer of its own, so that a regime can reach in between.

h = dropout(act(W x + b))      (T, width), what the aggregator sees; without an embedding, h = x
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from bagscope.mil.aggregators.layers import Activation, Projection, draw_seed, xavier
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.mil.regimes.regime import BuildInner
from bagscope.specs import Spec


class EmbeddingSpec(Spec):
    """The layer before the aggregator, initialised by Xavier's rule."""

    width: int = Field(default=512, ge=1, description="of an embedded tile")
    activation: Activation = Field(default="relu", description="relu or gelu")
    dropout: float = Field(default=0.25, ge=0, lt=1, description="of an embedded tile")


class Embedded(Aggregator):
    """An embedding layer, or none, and the aggregator behind it."""

    def __init__(
        self, features: int, outputs: int, spec: EmbeddingSpec | None, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.embedding: Projection | None = None
        if spec is not None:
            self.embedding = Projection(
                features, spec.width, activation=spec.activation, dropout=spec.dropout
            )
            xavier(self.embedding)
        self.width = features if spec is None else spec.width
        self.aggregator = build_inner(self.width, outputs)

    def embedded(self, bags: Bags) -> Bags:
        """Return the bags as the aggregator sees them."""
        if self.embedding is None:
            return bags
        seed = draw_seed(bags, use=4) if self.training else 0
        return replace(bags, features=self.embedding(bags.features, seed))

    def forward(self, bags: Bags) -> BagOutput:
        """Return what the aggregator says."""
        return self.aggregator(self.embedded(bags))

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return those of the aggregator."""
        return self.aggregator.pooling_terms(self.embedded(bags))

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return that of the aggregator."""
        return self.aggregator.rollout(self.embedded(bags))

    def after_step(self) -> None:
        """Hand on that the weights have changed."""
        self.aggregator.after_step()

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the aggregator; what lies before it changes with every bag."""
        self.aggregator.compile(*args, **options)

    @property
    def needs_grid(self) -> bool:
        """Return whether the aggregator does."""
        return self.aggregator.needs_grid

    @property
    def needs_micrometres(self) -> bool:
        """Return whether tiles without places in micrometres are refused."""
        return self.aggregator.needs_micrometres
