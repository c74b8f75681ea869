"""Set Transformer (Lee et al. 2019): tiles learn of each other through a few inducing rows.

h = ISAB(x), a few times             (T, hidden); or SAB, between all tiles
z = PMA(h)                           (B, seeds, hidden)
z = SAB(z), a few times, between the seeds
logits = Linear(mean of z over the seeds)

The blocks stand in set_layers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from bagscope.errors import ConfigError
from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.mil.aggregators.layers import draw_seed, dropped
from bagscope.mil.aggregators.query_scores import log_mean_weight
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.rolling import last_of, rolled_back
from bagscope.mil.aggregators.set_layers import ISAB, MAB, PMA, SAB
from bagscope.mil.bags import BagOutput, Bags
from bagscope.specs import Spec, refuse_unused


class SetTransformerOptions(Spec):
    """Options of Set Transformer."""

    hidden: int = Field(default=128, ge=1, description="width of every block")
    heads: int = Field(default=4, ge=1, description="heads of every attention")
    blocks: int = Field(default=2, ge=1, description="blocks over the tiles")
    attention: Literal["induced", "full"] = Field(
        default="induced",
        description="of those blocks: induced (through inducing rows) or full (between all tiles)",
    )
    inducing: int = Field(default=32, ge=1, description="of induced: inducing rows of a block")
    seeds: int = Field(default=1, ge=1, description="learned queries that pool the tiles")
    seed_blocks: int = Field(default=2, ge=0, description="blocks between the pooled seeds")
    layer_norm: bool = Field(default=False, description="whether blocks have layer norms")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what a block gives the tiles")

    @model_validator(mode="after")
    def _used(self) -> SetTransformerOptions:
        if self.attention == "full":
            refuse_unused(self, "inducing", of="attention induced", now="attention is full")
        return self


@register(
    "set_transformer",
    SetTransformerOptions,
    summary="attention between tiles through inducing rows, pooled by learned seeds",
    reference="Lee et al., Set Transformer, ICML 2019",
)
class SetTransformer(Aggregator):
    """A tile's score is the log of its mean weight over seeds and heads of the pooling."""

    def __init__(self, features: int, outputs: int, options: SetTransformerOptions) -> None:
        super().__init__()
        hidden, heads, is_normed = options.hidden, options.heads, options.layer_norm
        if hidden % heads:
            raise ConfigError(
                f"aggregator set_transformer: hidden is {hidden}, no multiple of the {heads} "
                "heads; change heads"
            )
        widths = [features] + [hidden] * (options.blocks - 1)
        self.encoder = nn.ModuleList(
            ISAB(width, hidden, heads, options.inducing, is_normed=is_normed)
            if options.attention == "induced"
            else SAB(width, hidden, heads, is_normed=is_normed)
            for width in widths
        )
        self.pooling = PMA(hidden, heads, options.seeds, is_normed=is_normed)
        self.decoder = nn.ModuleList(
            MAB(hidden, hidden, hidden, heads, is_normed=is_normed)
            for _ in range(options.seed_blocks)
        )
        self.classifier = nn.Linear(hidden, outputs)
        self.dropout = options.dropout

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are of tiles that know of others."""
        z, weights = self.pooling(last_of(self._layers(bags)), bags.cu_seqlens)
        for block in self.decoder:
            assert isinstance(block, MAB)
            z = block.between_rows(z)
        embedding = z.mean(1)
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=log_mean_weight(weights),
            score_kind="log_weight",
        )

    def rollout(self, bags: Bags) -> Tensor:
        """Return attention rollout (T,) from the seeds, which count alike; see `rolling`."""
        *before, last = self._layers(bags)
        _, weights = self.pooling(last, bags.cu_seqlens)
        products = []
        for block, x in zip(self.encoder, before, strict=True):
            assert isinstance(block, ISAB | SAB)
            products.append(partial(block.pulled, x, bags.cu_seqlens))
        found = rolled_back(weights.exp().mean((1, 2)), products)
        assert found is not None, "every product is known"
        return found

    def _layers(self, bags: Bags) -> Iterator[Tensor]:
        """Yield what each block, and then the pooling, is given: tiles (T, ·)."""
        narrow = computing_dtype(bags.features)
        h = bags.features.to(narrow)
        yield h
        for use, block in enumerate(self.encoder):
            h = block(h, bags.cu_seqlens)
            if self.training and self.dropout:
                h = dropped(h, self.dropout, draw_seed(bags, use))
            h = h.to(narrow)
            yield h
