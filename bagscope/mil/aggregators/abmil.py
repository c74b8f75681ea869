"""ABMIL: attention-based pooling (Ilse et al. 2018), with one gate or two.

h = act(W x + b)                    (T, hidden)
e = w·(gate(V h) ⊙ σ(U h)) + c      (T, 1); without `gated` no second factor
a = softmax of e over the bag,  z = Σ a h,  logits = Linear(z)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn
from torch.nn import functional

from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.mil.aggregators.registry import Aggregator, affine, register, xavier
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec


class ABMILOptions(Spec):
    """Options of ABMIL."""

    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    attention: int = Field(default=128, ge=1, description="width of the attention's hidden layer")
    gated: bool = Field(default=False, description="whether a second, sigmoid gate is there")
    gate: Literal["tanh", "relu"] = Field(default="tanh", description="the first gate")
    activation: Literal["relu", "gelu"] = Field(default="relu", description="of the projection")
    dropout: float = Field(default=0.25, ge=0, lt=1, description="of the projected tile")
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="of the gates")
    projection_bias: bool = Field(default=True, description="whether the projection has one")
    attention_bias: bool = Field(default=True, description="whether the attention has one")
    init: Literal["torch", "xavier"] = Field(default="torch", description="initial weights")


@register(
    "abmil",
    ABMILOptions,
    summary="attention pooling, one gate or two",
    reference="Ilse et al., Attention-based Deep Multiple Instance Learning, ICML 2018",
)
class ABMIL(Aggregator):
    """Attention pooling with one branch."""

    def __init__(self, features: int, outputs: int, options: ABMILOptions) -> None:
        super().__init__()
        self.options = options
        hidden, attention, has_bias = options.hidden, options.attention, options.attention_bias
        self.projection = nn.Linear(features, hidden, bias=options.projection_bias)
        self.attention_v = nn.Linear(hidden, attention, bias=has_bias)
        self.attention_u = nn.Linear(hidden, attention, bias=has_bias) if options.gated else None
        self.attention_w = nn.Linear(attention, 1, bias=has_bias)
        self.classifier = nn.Linear(hidden, outputs)
        if options.init == "xavier":
            xavier(self)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are the attention's logits."""
        found = self._pool(bags)
        embedding = found.pooled[:, 0]
        return BagOutput(
            logits=functional.linear(embedding, *affine(self.classifier)),
            embedding=embedding,
            scores=found.scores,
            score_kind="log_weight",
            entropy=found.entropy,
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's score and its class logits at weight 1."""
        features = bags.features.to(self.projection.weight.dtype)
        act = getattr(functional, self.options.activation)
        h = act(self.projection(features))
        return PoolingTerms(
            scores=self._pool(bags).scores,
            values=functional.linear(h, self.classifier.weight)[:, None],
            bias=self.classifier.bias,
        )

    def _pool(self, bags: Bags) -> PooledBags:
        options, drops = self.options, self.training
        weight_v, bias_v = affine(self.attention_v)
        weight_u, bias_u = affine(self.attention_u) if self.attention_u else (None, None)
        weight_w, bias_w = affine(self.attention_w)
        return gated_attention_pool(
            bags.features,
            bags.cu_seqlens,
            projection=affine(self.projection),
            activation=options.activation,
            weight_v=weight_v,
            bias_v=bias_v,
            weight_u=weight_u,
            bias_u=bias_u,
            weight_w=weight_w,
            bias_w=bias_w,
            gate=options.gate,
            dropout_p=options.attention_dropout if drops else 0.0,
            projection_dropout_p=options.dropout if drops else 0.0,
            seed=bags.seed * 1_000_003 + bags.step,
        )
