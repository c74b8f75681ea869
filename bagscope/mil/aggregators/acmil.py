"""ACMIL (Zhang et al. 2024): several branches of attention, kept from agreeing on few tiles.

h = act(W x),  a^m = softmax of branch m's logits over the bag,  ā = mean of a^m over the branches
branch m:   logits = Linear_m(Σ a^m h)       each is to be right by itself (`branch_logits`)
bag:        logits = Linear(Σ ā h)
diversity:  the mean cosine of a^m and a^m' over the pairs of branches
In training, of each branch's k highest logits ⌊k p⌋ are masked before the softmax (STKIM).

With `attention: multihead` a branch is multi-head attention: see multihead_branches.py.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.topk_mask import topk_mask
from bagscope.mil.aggregators.branches import Branched, GatedBranches, Mask
from bagscope.mil.aggregators.gated_attention import GatedAttention
from bagscope.mil.aggregators.layers import Activation, Projection
from bagscope.mil.aggregators.multihead_branches import MultiHeadBranches
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec

_MASKED = -1e9
"""So far below any logit that its weight is exactly 0, and yet a number."""
_WIDTH, _HEADS, _DROPOUT = 128, 8, 0.1


class ACMILOptions(Spec):
    """Options of ACMIL."""

    attention: Literal["gated", "multihead"] = Field(
        default="gated", description="what a branch is: gated or multihead attention"
    )
    branches: int = Field(default=5, ge=1, description="branches of attention")
    hidden: int | None = Field(
        default=None, ge=1, description="width of the projected tile; by the encoder's if not set"
    )
    activation: Activation = Field(default="relu", description="of the projection: relu or gelu")
    projection_bias: bool = Field(default=False, description="whether the projection has one")
    attention_width: int | None = Field(
        default=None, ge=1, description=f"gated: width of the gates; {_WIDTH} if not set"
    )
    heads: int | None = Field(
        default=None, ge=1, description=f"multihead: heads of a branch; {_HEADS} if not set"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description=f"multihead: of its vector; {_DROPOUT} if not set"
    )
    stkim_k: int = Field(
        default=10, ge=0, description="most attended tiles of a branch that may be masked"
    )
    stkim_p: float = Field(default=0.6, ge=0, le=1, description="share of them that is masked")
    stkim_exactly: bool = Field(
        default=True, description="whether exactly that share is, or each tile by that chance"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ACMILOptions:
        foreign = ("heads", "dropout") if self.attention == "gated" else ("attention_width",)
        for name in foreign:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning with attention {self.attention}")
        return self


@register(
    "acmil",
    ACMILOptions,
    summary="several branches of attention that are kept apart",
    reference="Zhang et al., Attention-Challenging Multiple Instance Learning for Whole Slide "
    "Image Classification, ECCV 2024",
)
class ACMIL(Aggregator):
    """Attention pooling with several branches; a tile's score is the log of their mean weight."""

    def __init__(self, features: int, outputs: int, options: ACMILOptions) -> None:
        super().__init__()
        self.options = options
        hidden = options.hidden or default_hidden(features)
        self.branches = _branches_of(features, hidden, options)
        self.branch_classifier = nn.Linear(hidden, options.branches * outputs)
        self.classifier = nn.Linear(hidden, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits, those of every branch, and the loss "diversity".

        A single branch has neither: its head stays unused, so that it is ABMIL.
        """
        found: Branched = self.branches(bags, self._masked(bags))
        log_weights = found.log_weights(bags.cu_seqlens).flatten(1)
        heads = log_weights.shape[1]
        has_several = self.options.branches > 1
        return BagOutput(
            logits=self.classifier(found.together),
            embedding=found.together,
            scores=log_weights.logsumexp(1, keepdim=True) - math.log(heads),
            score_kind="log_weight",
            branch_logits=self._branch_logits(found.each) if has_several else None,
            entropy=found.entropy,
            losses={"diversity": found.diversity(bags.cu_seqlens)} if has_several else {},
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return each branch's scores and each tile's class logits, divided by the branches.

        None for multi-head branches: a layer norm stands between the sum and the logits.
        """
        if not isinstance(self.branches, GatedBranches):
            return None
        attention = self.branches.attention
        weight, bias = self.classifier.weight, self.classifier.bias
        h = attention.projected(bags.features.to(weight.dtype))
        shares = functional.linear(h, weight) / self.options.branches
        return PoolingTerms(
            scores=attention(bags).scores,
            values=shares[:, None].expand(-1, self.options.branches, -1),
            bias=bias,
        )

    def _branch_logits(self, each: Tensor) -> Tensor:
        shape = (self.options.branches, -1)
        weight = self.branch_classifier.weight.view(*shape, each.shape[2])
        logits = torch.einsum("bmd,mcd->bmc", each, weight)
        return logits + self.branch_classifier.bias.view(shape)

    def _masked(self, bags: Bags) -> Mask | None:
        options = self.options
        if not self.training or not options.stkim_k or not options.stkim_p:
            return None

        def mask(scores: Tensor) -> Tensor:
            is_masked = topk_mask(
                scores,
                bags.cu_seqlens,
                options.stkim_k,
                options.stkim_p,
                seed=bags.seed,
                step=bags.step,
                bag_ids=bags.bag_keys,
                exactly=options.stkim_exactly,
            )
            return scores.masked_fill(is_masked, _MASKED)

        return mask


def default_hidden(features: int) -> int:
    """Return the width that a tile is projected to: half of the encoder's, as the authors choose.

    384 goes to 128, which is theirs too; others to a multiple of 8, for the heads.
    """
    return 128 if features == 384 else 8 * math.ceil(features / 16)


def _branches_of(
    features: int, hidden: int, options: ACMILOptions
) -> GatedBranches | MultiHeadBranches:
    bias, activation = options.projection_bias, options.activation
    if options.attention == "gated":
        width = options.attention_width or _WIDTH
        return GatedBranches(
            GatedAttention(
                features,
                hidden,
                width,
                options.branches,
                activation=activation,
                projection_bias=bias,
            )
        )
    heads = options.heads or _HEADS
    if hidden % heads:
        raise ConfigError(
            f"aggregator acmil: hidden is {hidden}, no multiple of the {heads} heads; change heads"
        )
    return MultiHeadBranches(
        Projection(features, hidden, bias=bias, activation=activation),
        branches=options.branches,
        heads=heads,
        dropout=_DROPOUT if options.dropout is None else options.dropout,
    )
