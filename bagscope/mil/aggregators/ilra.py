"""ILRA (Xiang & Zhang 2023): tiles are rewritten through a few learned rows, then pooled by others.

h = GAB(x), a few times              (T, hidden): r learned rows ask the tiles, the tiles ask them
z = ATT(S, h)                        (B, seeds, hidden), learned rows S pool the tiles
logits_s = Linear(z_s)               each seed's; the bag's are their mean

The blocks stand in ilra_layers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pydantic import Field
from torch import Tensor, nn

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.ilra_layers import GAB, GatedAttentionBlock
from bagscope.mil.aggregators.layers import draw_seed, dropped
from bagscope.mil.aggregators.query_scores import log_mean_weight
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.rolling import last_of, rolled_back
from bagscope.mil.aggregators.set_layers import learned_rows
from bagscope.mil.bags import BagOutput, Bags
from bagscope.specs import Spec


class ILRAOptions(Spec):
    """Options of ILRA."""

    hidden: int = Field(default=256, ge=1, description="width of every block")
    heads: int = Field(default=8, ge=1, description="heads of every attention")
    layers: int = Field(default=2, ge=1, description="blocks over the tiles")
    rank: int = Field(default=1, ge=1, description="learned rows of a block")
    seeds: int | None = Field(
        default=None, ge=1, description="learned rows that pool the tiles; as rank if not set"
    )
    layer_norm: bool = Field(default=False, description="whether blocks have layer norms")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what a block gives the tiles")


@register(
    "ilra",
    ILRAOptions,
    summary="tiles rewritten through few learned rows, then pooled by a learned seed",
    reference="Xiang & Zhang, Exploring Low-Rank Property in MIL, ICLR 2023",
)
class ILRA(Aggregator):
    """A tile's score is the log of its mean weight over seeds and heads of the pooling."""

    def __init__(self, features: int, outputs: int, options: ILRAOptions) -> None:
        super().__init__()
        hidden, heads, is_normed = options.hidden, options.heads, options.layer_norm
        if hidden % heads:
            raise ConfigError(
                f"aggregator ilra: hidden is {hidden}, no multiple of the {heads} heads; change "
                "heads"
            )
        widths = [features] + [hidden] * (options.layers - 1)
        self.blocks = nn.ModuleList(
            GAB(width, hidden, heads, options.rank, is_normed=is_normed) for width in widths
        )
        self.seeds = learned_rows(options.seeds or options.rank, hidden)
        self.pooling = GatedAttentionBlock(
            hidden, hidden, hidden, heads, is_gated=False, is_normed=is_normed
        )
        self.classifier = nn.Linear(hidden, outputs)
        nn.init.xavier_normal_(self.classifier.weight)
        self.dropout = options.dropout

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits, and those of several seeds as branches; tiles know of others."""
        last = last_of(self._layers(bags))
        z, log_weights = self.pooling.gather(self.seeds, last, bags.cu_seqlens)
        branches = self.classifier(z)
        return BagOutput(
            logits=branches.mean(1),
            embedding=z.mean(1),
            scores=log_mean_weight(log_weights),
            score_kind="log_weight",
            branch_logits=branches if branches.shape[1] > 1 else None,
        )

    def rollout(self, bags: Bags) -> Tensor:
        """Return attention rollout (T,) from the seeds, gates left out; see `rolling`."""
        *before, last = self._layers(bags)
        _, log_weights = self.pooling.gather(self.seeds, last, bags.cu_seqlens)
        products = []
        for block, x in zip(self.blocks, before, strict=True):
            assert isinstance(block, GAB)
            products.append(partial(block.pulled, x, bags.cu_seqlens))
        found = rolled_back(log_weights.exp().mean(1), products)
        assert found is not None, "every product is known"
        return found

    def _layers(self, bags: Bags) -> Iterator[Tensor]:
        """Yield what each block, and then the pooling, is given: tiles (T, ·)."""
        # In full precision: gates multiply, so each block would enlarge what narrow products lose.
        h = bags.features.to(self.seeds.dtype)
        yield h
        for use, block in enumerate(self.blocks):
            h = block(h, bags.cu_seqlens)
            if self.training and self.dropout:
                h = dropped(h, self.dropout, draw_seed(bags, use))
            yield h
