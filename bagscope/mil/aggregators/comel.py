"""CoMEL: tiles re-embedded through groups, pooled by attention, and judged one by one.

h = act(W x + b);  h ← h + grouped double attention (see `grouped_attention`), then LN
e = w·(tanh(V h) ⊙ σ(U h)) + c,  a = softmax of e over the bag
bag:   logits = Linear(Σ a h)
tile:  o = Linear'(h)
In training, pseudo-labels by two prototypes of a positive bag (BPPL):
    p⁺ = Σ a h,  p⁻ = Σ softmax(−e) h,  Δ_i = cos(h_i, p⁺) − cos(h_i, p⁻)
    a tile has the bag's class where Δ > δ, the first class where Δ < −δ, else none
    δ = margin · mean |Δ| over the bag;  all tiles of a bag of the first class have it
    instance = the mean cross-entropy of o over the labelled tiles
A reconstruction: what is public of CoMEL leaves equations and numbers open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.segment_softmax_pool import accumulator, segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.grouped_attention import GroupedAttention
from bagscope.mil.aggregators.layers import Activation, Projection, affine, draw_seed
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec

if TYPE_CHECKING:
    from bagscope.mil.recipe import TrainSpec
    from bagscope.mil.targets import TargetSpec

UNLABELLED = -1


class CoMELOptions(Spec):
    """Options of CoMEL."""

    hidden: int = Field(default=256, ge=1, description="width of the projected tile")
    activation: Activation = Field(default="relu", description="of the projection: relu or gelu")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the projected tile")
    layers: int = Field(default=1, ge=1, description="of grouped double attention")
    groups: int = Field(default=64, ge=1, description="of consecutive tiles, in each bag")
    heads: int = Field(default=8, ge=1, description="of grouped double attention")
    attention: int = Field(default=128, ge=1, description="width of the pooling's gates")
    margin: float = Field(
        default=1.0,
        ge=0,
        description="how much nearer to one prototype a tile with a pseudo-label is, in means of "
        "its bag",
    )


@register(
    "comel",
    CoMELOptions,
    summary="tiles that learn through groups, and a classifier of tiles with pseudo-labels",
    reference="CoMEL, ICCV 2025; a reconstruction from what is public",
    is_order_free=False,
)
class CoMEL(Aggregator):
    """Grouped double attention, attention pooling, and a classifier of tiles."""

    label_terms = ("instance",)

    def __init__(self, features: int, outputs: int, options: CoMELOptions) -> None:
        super().__init__()
        self.options = options
        hidden, width = options.hidden, options.attention
        self.projection = Projection(
            features, hidden, activation=options.activation, dropout=options.dropout
        )
        self.layers = nn.ModuleList(
            GroupedAttention(hidden, groups=options.groups, heads=options.heads)
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.v = nn.Linear(hidden, width)
        self.u = nn.Linear(hidden, width)
        self.w = nn.Linear(width, 1)
        self.classifier = nn.Linear(hidden, outputs)
        self.instance = nn.Linear(hidden, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are the logits of each tile, which knows of the others."""
        h = self._hidden(bags)
        found = self._pooled(h, bags)
        embedding = found.pooled[:, 0]
        scores: Tensor = self.instance(h)
        losses = {}
        labels = bags.class_index
        # A single output is a number or a risk, never one of several classes.
        if self.training and labels is not None and self.classifier.out_features > 1:
            pseudo = self._pseudo_labels(h.detach(), found, bags, labels)
            losses["instance"] = labelled_mean(scores, pseudo, bags.cu_seqlens)
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=scores,
            score_kind="instance_logit",
            entropy=found.entropy,
            losses=losses,
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's attention and its class logits at weight 1, beside those it has."""
        h = self._hidden(bags)
        return PoolingTerms(
            scores=self._pooled(h, bags).scores,
            values=functional.linear(h, self.classifier.weight)[:, None],
            bias=self.classifier.bias,
        )

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse all but one target of classes.

        Raises:
            ConfigError: says what it is in place of that.
        """
        if len(targets) != 1 or targets[0].task != "classes":
            said = ", ".join(f"{target.name} ({target.task})" for target in targets)
            raise ConfigError(
                "aggregator comel gives its tiles a class, so it learns one target of classes, and "
                f"it is given {said}; choose another aggregator, or such a target"
            )

    def _hidden(self, bags: Bags) -> Tensor:
        """Return the re-embedded tiles (T, hidden), in full precision."""
        h = self.projection(bags.features, draw_seed(bags) if self.training else 0)
        narrow = h.dtype
        h = h.to(accumulator(narrow))
        for layer in self.layers:
            h = layer(h, bags.cu_seqlens, narrow)
        found: Tensor = self.norm(h)
        return found

    def _pooled(self, h: Tensor, bags: Bags) -> PooledBags:
        gates: dict[str, Any] = {}
        for name, layer in (("v", self.v), ("u", self.u), ("w", self.w)):
            gates[f"weight_{name}"], gates[f"bias_{name}"] = affine(layer)
        return gated_attention_pool(h, bags.cu_seqlens, **gates)

    @torch.no_grad()
    def _pseudo_labels(self, h: Tensor, found: PooledBags, bags: Bags, labels: Tensor) -> Tensor:
        """Return the class (T,) of each tile, `UNLABELLED` where it is left out."""
        like = segment_softmax_pool(found.scores, h, bags.cu_seqlens).pooled[:, 0]
        unlike = segment_softmax_pool(-found.scores, h, bags.cu_seqlens).pooled[:, 0]
        bag = bag_of_tile(bags.cu_seqlens, len(h))
        nearer = functional.cosine_similarity(h, like[bag]) - functional.cosine_similarity(
            h, unlike[bag]
        )
        sums = nearer.new_zeros(len(bags)).index_add(0, bag, nearer.abs())
        least = self.options.margin * sums / bags.lengths.clamp(min=1)
        own = labels[bag]
        found_class = torch.where(nearer > least[bag], own, UNLABELLED)
        found_class = torch.where(nearer < -least[bag], 0, found_class)
        is_positive = (own > 0) & (own < self.classifier.out_features)
        return torch.where(is_positive, found_class, torch.where(own == 0, 0, UNLABELLED))


def labelled_mean(logits: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean cross-entropy (B,) over each bag's labelled tiles; 0 where it has none.

    Args:
        logits: (T, C).
        labels: (T,), `UNLABELLED` where a tile takes no part.
        cu_seqlens: (B + 1,) int32.
    """
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED)
    bag = bag_of_tile(cu_seqlens, len(logits))
    bags = len(cu_seqlens) - 1
    counts = torch.zeros(bags, dtype=torch.int64, device=bag.device)
    counts = counts.index_add(0, bag, (labels != UNLABELLED).long())
    return losses.new_zeros(bags).index_add(0, bag, losses) / counts.clamp(min=1)
